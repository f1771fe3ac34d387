//! Changes of the node's key.

use super::Controller;
use crate::control::rotation::{RotationError, RotationRequest};

impl Controller {
    /// Somebody wants another key.
    pub(super) async fn begin_rotation(&mut self, asked: RotationRequest) {
        if asked.answer.is_closed() {
            // Whoever asked was told that nobody answers, and may have asked again.
            return;
        }
        let away = self.registry.status().source_error;
        let before = self.rotation.public();
        let begun = match (self.started, away) {
            (false, _) => Err(RotationError::Starting),
            // Nobody could be told of the new key, and nobody would take the old one.
            (true, Some(error)) if asked.at_once => Err(RotationError::NoRecords(error)),
            (true, _) => self.rotation.begin(asked.at_once).map_err(RotationError::from),
        };
        if self.rotation.public() != before {
            self.on_keys_changed().await;
        }
        // Whoever asked may have gone.
        let _ = asked.answer.send(begun.map(|()| self.rotation.status()));
    }

    /// Goes on with a change of the key, where it is time.
    pub(super) async fn step_rotation(&mut self) {
        if !self.started {
            return;
        }
        let before = self.rotation.public();
        let held = self.published.dataplane.get().second_key_peers;
        let result = self.rotation.step(self.registry.published_keys(), held);
        if self.rotation.public() != before {
            self.on_keys_changed().await;
        }
        let mut status = self.rotation.status();
        if let Err(failure) = result {
            let complaint = format!("the key cannot be changed: {failure}");
            tracing::error!("{complaint}");
            status.waits_for = Some(complaint);
        }
        self.published.node.set_key(status);
    }

    /// This node has other keys: they must be answered to before anybody is told of them.
    pub(super) async fn on_keys_changed(&mut self) {
        self.registry.set_keys(self.rotation.public());
        self.publish_snapshot_and_wait().await;
        self.published.node.set_key(self.rotation.status());
    }
}
