//! Current state of this node's records, interface and key, which the control process shares with
//! its readers.

use tokio::sync::watch;

use super::document::{InterfaceStatus, RegistryStatus, RotationStatus};

/// Sender of the node's state. The control process owns it.
#[derive(Debug)]
pub struct NodeState {
    registry: watch::Sender<RegistryStatus>,
    interface: watch::Sender<InterfaceStatus>,
    key: watch::Sender<RotationStatus>,
}

/// Receiver of the node's state, always current. Cheap to clone.
#[derive(Debug, Clone)]
pub struct NodeView {
    registry: watch::Receiver<RegistryStatus>,
    interface: watch::Receiver<InterfaceStatus>,
    key: watch::Receiver<RotationStatus>,
}

impl NodeState {
    /// Returns the state of a node with this key, before its records are read and its interface
    /// exists.
    pub fn new(key: RotationStatus) -> Self {
        Self {
            registry: watch::Sender::default(),
            interface: watch::Sender::default(),
            key: watch::Sender::new(key),
        }
    }

    /// Returns a receiver of the state.
    pub fn view(&self) -> NodeView {
        NodeView {
            registry: self.registry.subscribe(),
            interface: self.interface.subscribe(),
            key: self.key.subscribe(),
        }
    }

    /// Stores the state of the node records.
    pub fn set_registry(&self, registry: RegistryStatus) {
        self.registry.send_replace(registry);
    }

    /// Stores the desired state of the interface.
    pub fn set_interface(&self, interface: InterfaceStatus) {
        self.interface.send_replace(interface);
    }

    /// Stores the state of the key. Receivers of [`NodeView::follow_key`] wake up only if the keys
    /// differ.
    pub fn set_key(&self, key: RotationStatus) {
        self.key.send_if_modified(|known| {
            let changed = known.keys != key.keys;
            *known = key;
            changed
        });
    }
}

impl NodeView {
    /// Returns the state of the node records.
    pub fn registry(&self) -> RegistryStatus {
        self.registry.borrow().clone()
    }

    /// Returns the desired state of the interface.
    pub fn interface(&self) -> InterfaceStatus {
        self.interface.borrow().clone()
    }

    /// Returns the state of the key.
    pub fn key(&self) -> RotationStatus {
        self.key.borrow().clone()
    }

    /// Returns a receiver that waits for other keys.
    pub fn follow_key(&self) -> watch::Receiver<RotationStatus> {
        self.key.clone()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use skein_ipc::keys::PublicKey;

    use super::*;

    #[test]
    fn change_of_key_age_does_not_wake_receivers() {
        let key = RotationStatus::of(PublicKey([1; 32]));
        let state = NodeState::new(key.clone());
        let follower = state.view().follow_key();
        state.set_key(RotationStatus { age_seconds: 7, ..key });
        assert_eq!(state.view().key().age_seconds, 7, "The age is stored.");
        assert!(!follower.has_changed().unwrap(), "An age must not wake up a follower.");
        state.set_key(RotationStatus::of(PublicKey([2; 32])));
        assert!(follower.has_changed().unwrap(), "Another key must wake up a follower.");
    }
}
