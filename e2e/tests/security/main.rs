//! Unauthenticated senders, firewall rules, plaintext leaks, and confinement of the processes.

mod firewall;
mod floods;
mod hardening;
mod plaintext;
mod strangers;
