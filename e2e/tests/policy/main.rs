//! Network policies of pods that the CNI plugin attached.

mod control;
mod faults;
mod first_packet;
mod static_mode;
mod support;
