//! Key rotation of this node.

use super::Controller;
use crate::control::rotation::{RotationError, RotationRequest};

impl Controller {
    /// Starts the rotation that an operator has requested, and answers the request.
    pub(super) async fn begin_rotation(&mut self, asked: RotationRequest) {
        if asked.answer.is_closed() {
            // The client's request has timed out, and the operator may have repeated it.
            return;
        }
        let away = self.registry.status().source_error;
        let before = self.rotation.public();
        let begun = match (self.started, away) {
            (false, _) => Err(RotationError::Starting),
            // No peer would learn the new key, and this node would no longer accept the old one.
            (true, Some(error)) if asked.at_once => Err(RotationError::NoRecords(error)),
            (true, _) => self.rotation.begin(asked.at_once).map_err(RotationError::from),
        };
        if self.rotation.public() != before {
            self.on_keys_changed().await;
        }
        // The client may have closed its connection.
        let _ = asked.answer.send(begun.map(|()| self.rotation.status()));
    }

    /// Performs the next step of a rotation if it is due.
    pub(super) async fn step_rotation(&mut self) {
        if !self.started {
            return;
        }
        let before = self.rotation.public();
        let held = self.published.dataplane.observed().report.second_key_peers;
        let result = self.rotation.step(self.registry.published_keys(), held);
        if self.rotation.public() != before {
            self.on_keys_changed().await;
        }
        let mut status = self.rotation.status();
        if let Err(failure) = result {
            let problem = format!("key rotation failed: {failure}");
            tracing::error!("{problem}");
            status.waits_for = Some(problem);
        }
        self.published.node.set_key(status);
    }

    /// Passes changed keys to the data process, and shows them in the status after that: this node
    /// must accept a key before peers learn it.
    pub(super) async fn on_keys_changed(&mut self) {
        self.registry.set_keys(self.rotation.public());
        self.publish_snapshot_and_wait().await;
        self.published.node.set_key(self.rotation.status());
    }
}
