"""Config files and sections: read, checked and described, before anything is built."""
