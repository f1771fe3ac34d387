//! Segmentation and checksum offloads, and their fallbacks.

mod fallbacks;
