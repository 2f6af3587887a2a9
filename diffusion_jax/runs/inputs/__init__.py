"""What a caller gives to a Pipeline -> checked arrays, as models read them."""
