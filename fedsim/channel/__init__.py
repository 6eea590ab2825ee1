"""What happens to a message on its way between server and client."""
