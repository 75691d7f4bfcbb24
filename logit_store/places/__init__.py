"""Where the files of a store are, and how they are written whole: local disks, object stores, a cache."""
