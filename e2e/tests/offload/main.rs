//! Segmentation and checksum offloads, and their fallbacks.

mod ladder;
