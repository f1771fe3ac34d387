//! Locks of attachments. A runtime whose ADD has timed out sends a DEL while the agent still works
//! on the ADD.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use skein_cni_protocol::AttachmentId;
use tokio::sync::OwnedMutexGuard;

/// Locks by attachment. A lock that is not in use is removed when another one is added.
#[derive(Debug, Default)]
pub(super) struct Locks(Mutex<HashMap<AttachmentId, Weak<tokio::sync::Mutex<()>>>>);

impl Locks {
    /// Acquires the lock of an attachment; waits while another task holds it.
    pub(super) async fn lock(&self, id: &AttachmentId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match locks.get(id).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    locks.retain(|_, lock| lock.strong_count() > 0);
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    locks.insert(id.clone(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lock_waits_for_same_attachment_only() {
        let locks = Locks::default();
        let id = |name: &str| AttachmentId { container_id: name.into(), ifname: "eth0".into() };
        let a = locks.lock(&id("a")).await;
        let b = locks.lock(&id("b")).await;
        let timeout = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(timeout, locks.lock(&id("a"))).await.is_err());
        drop((a, b));
        let _a = locks.lock(&id("a")).await;
        let _c = locks.lock(&id("c")).await;
        assert_eq!(
            locks.0.lock().unwrap_or_else(PoisonError::into_inner).len(),
            2,
            "the unused lock of b is removed"
        );
    }
}
