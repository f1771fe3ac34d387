//! Unauthenticated senders, firewall rules, plaintext leaks, and confinement of the processes.

mod border;
mod firewall;
mod firewall_repair;
mod firewall_reports;
mod flood_cost;
mod floods;
mod hardening;
mod overheard;
mod plaintext;
mod scene;
mod strangers;
