"""How weights reach the servers, one file each."""
