//! What a node needs, and whether it is there.
