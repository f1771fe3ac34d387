//! Connectivity over the overlay: protocols, sizes, address families, and impaired underlays.

mod congestion;
mod families;
mod impairments;
mod integrity;
mod traffic;
mod underlay;
