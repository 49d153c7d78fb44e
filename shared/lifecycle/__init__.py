"""How a process of Phloem starts, stops, and keeps its children from outliving it."""
