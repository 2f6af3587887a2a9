"""Where records come from: TFDS data sets, image folders, and data inside packages."""
