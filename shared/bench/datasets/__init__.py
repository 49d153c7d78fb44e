"""What can be sent. A dataset is a function of its options and a seed: equal ones make equal sessions."""
