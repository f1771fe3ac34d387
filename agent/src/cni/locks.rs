//! One request at a time for each attachment: a runtime that has given up on an ADD sends a DEL while
//! the ADD is still at work.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use skein_cni_protocol::AttachmentId;
use tokio::sync::OwnedMutexGuard;

/// Locks by attachment; only those in use are kept.
#[derive(Debug, Default)]
pub(super) struct Locks(Mutex<HashMap<AttachmentId, Weak<tokio::sync::Mutex<()>>>>);

impl Locks {
    /// Waits until nobody else works on this attachment.
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
    async fn the_same_waits_another_does_not_and_nothing_is_kept() {
        let locks = Locks::default();
        let id = |name: &str| AttachmentId { container_id: name.into(), ifname: "eth0".into() };
        let a = locks.lock(&id("a")).await;
        let b = locks.lock(&id("b")).await;
        let again = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(again, locks.lock(&id("a"))).await.is_err());
        drop((a, b));
        let _a = locks.lock(&id("a")).await;
        let _c = locks.lock(&id("c")).await;
        assert_eq!(locks.0.lock().unwrap_or_else(PoisonError::into_inner).len(), 2, "b is gone");
    }
}
