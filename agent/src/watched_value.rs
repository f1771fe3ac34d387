//! Values that one task publishes to others by a watch channel.

use tokio::sync::watch;

/// Replaces the value of a channel, and notifies the receivers if the new value is different.
pub(crate) fn send_if_changed<T: PartialEq>(sender: &watch::Sender<T>, value: T) {
    sender.send_if_modified(|present| {
        let differs = *present != value;
        *present = value;
        differs
    });
}
