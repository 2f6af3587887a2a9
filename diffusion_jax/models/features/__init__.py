"""Networks whose features compare images and videos; their weights come from files and packages."""
