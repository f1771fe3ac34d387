//! Rotation of a node's key.

mod key;
