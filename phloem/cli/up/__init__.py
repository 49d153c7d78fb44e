"""`phloem up`: a whole cluster on one machine, supervised."""
