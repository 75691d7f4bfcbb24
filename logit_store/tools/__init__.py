"""What people do with stores: look at, verify, compare, join, cut, encode anew, export."""
