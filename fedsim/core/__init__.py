"""What every other room builds on: parameters, records, random streams, errors, files. Imports torch and numpy at most."""
