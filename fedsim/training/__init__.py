"""Training a pack of clients on one device."""
