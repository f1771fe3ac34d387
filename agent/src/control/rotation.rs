//! Rotation of this node's key without interruption of traffic.
//!
//! 1. `announced`: the next key is created, and the node's record names it next to the active key.
//!    Peers that have read the record accept both keys.
//! 2. `changed`: the next key becomes the active one. This node starts handshakes with it, and
//!    still accepts the old key.
//! 3. `steady`: the old key is removed from the record and from the disk.
//!
//! In Kubernetes the agent writes the record and waits `key_rotation.settle_seconds` between the
//! steps. Elsewhere an operator writes the record, and the agent follows it.

pub mod files;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use skein_ipc::keys::{PrivateKey, PublicKeys};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use self::files::{next_path, previous_path, read_second, remove, second_key_paths};
use super::identity;
use crate::config::{Config, KeyRotation};
use crate::failure::Failure;
use crate::files::sync_beside;
use crate::status::{RotationStatus, Stage};

/// Maximum wait for peers that still use the old key before it is removed. A peer without access to
/// the API server knows only the old key, and a hostile peer must not block the rotation forever.
const MAX_OLD_KEY_WAIT: Duration = Duration::from_secs(86_400);

/// Request for a key rotation.
#[derive(Debug)]
pub struct RotationRequest {
    /// True to invalidate the old key immediately, which interrupts traffic until peers know the
    /// new key.
    pub at_once: bool,
    /// Sender of the new state, or of the reason why the rotation did not start.
    pub answer: oneshot::Sender<Result<RotationStatus, RotationError>>,
}

/// Failure of a request for a key rotation.
#[derive(Debug, Error)]
pub enum RotationError {
    /// The agent does not know its node records yet.
    #[error("the agent is still starting")]
    Starting,
    /// The node records cannot be read or written, so that no other node would learn the new key.
    #[error("cannot rotate the key at once while the node records are not available: {0}")]
    NoRecords(String),
    /// The agent stops before it has answered.
    #[error("the agent is ending")]
    Ending,
    /// The rotation cannot start, or a step failed.
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// Sender of requests for a key rotation.
pub type RotationSender = mpsc::Sender<RotationRequest>;

/// Private keys of this node.
#[derive(Debug, Clone, Copy)]
pub struct NodeKeys<'a> {
    /// Private key with which this node starts handshakes.
    pub current: &'a PrivateKey,
    /// The next or the previous key during a rotation.
    pub second: Option<&'a PrivateKey>,
}

/// Private keys of this node, and the stage of the rotation.
///
/// Order of calls: [`Rotation::load`] at the start; [`Rotation::begin`] for a request of an
/// operator; [`Rotation::step`] every few seconds, after each change of the node records, and at
/// [`Rotation::deadline`]. After each call the caller compares [`Rotation::public`] with its
/// earlier value, even after an error, and passes changed keys to the data process. The state on
/// disk always counts, so that after a failed step the keys are read again.
#[derive(Debug)]
pub struct Rotation {
    path: PathBuf,
    settings: KeyRotation,
    /// True if the agent writes this node's record itself (Kubernetes).
    writes_record: bool,
    current: PrivateKey,
    second: Option<(Stage, PrivateKey)>,
    public: PublicKeys,
    /// Time since which peers can read the record of this stage; `None` while they cannot.
    /// Monotonic clock, because a jump of the wall clock would end the wait early.
    readable_since: Option<Instant>,
    /// Number of peers that still use the old key.
    old_key_peers: usize,
}

impl Rotation {
    /// Reads the keys and removes incomplete key files of an earlier process. Creates the key at
    /// the first start.
    ///
    /// # Errors
    /// [`Failure`] if a key file is missing, unreadable or invalid, or if both a next and a
    /// previous key exist.
    pub fn load(config: &Config) -> Result<Self, Failure> {
        let path = config.key_path();
        let current = identity::for_node(config)?;
        files::remove_incomplete(&path);
        let second = read_second(&path, &current)?;
        Ok(Self {
            path,
            settings: config.key_rotation,
            writes_record: config.kubernetes.enabled,
            public: public_keys(&current, second.as_ref())?,
            current,
            second,
            readable_since: None,
            old_key_peers: 0,
        })
    }

    /// Reads the keys from the disk after a failed step, which may have changed them.
    fn reload(&mut self) {
        self.readable_since = None;
        let read = || -> Result<_, Failure> {
            let current = identity::load(&self.path)?;
            let none = || Failure::Usage(format!("the key {} is missing", self.path.display()));
            let current = current.ok_or_else(none)?;
            let second = read_second(&self.path, &current)?;
            Ok((public_keys(&current, second.as_ref())?, current, second))
        };
        match read() {
            Ok((public, current, second)) => {
                (self.public, self.current, self.second) = (public, current, second);
            }
            Err(error) => tracing::error!(%error, "cannot read the keys, the active keys stay"),
        }
    }

    /// Returns the private keys.
    pub fn keys(&self) -> NodeKeys<'_> {
        NodeKeys { current: &self.current, second: self.second.as_ref().map(|(_, key)| key) }
    }

    /// Returns the public keys.
    pub fn public(&self) -> PublicKeys {
        self.public
    }

    /// Returns the stage of the rotation.
    pub fn stage(&self) -> Stage {
        self.second.as_ref().map_or(Stage::Steady, |(stage, _)| *stage)
    }

    /// Returns the state of the rotation, for the status.
    pub fn status(&self) -> RotationStatus {
        RotationStatus {
            stage: self.stage(),
            keys: self.public,
            age_seconds: self.age().as_secs(),
            waits_for: self.waits_for(),
        }
    }

    /// Returns the condition for the next step; `None` if no rotation is active.
    fn waits_for(&self) -> Option<String> {
        let second = self.public.second?;
        let record = "this node's record on every node";
        if !self.writes_record {
            return Some(match self.stage() {
                Stage::Changed => {
                    format!("{record}: remove second_public_key after three minutes")
                }
                _ => format!(
                    "{record}: set second_public_key = \"{second}\" first. When all nodes have it, set \
                     public_key to that key and second_public_key = \"{}\".",
                    self.public.first
                ),
            });
        }
        let Some(readable_since) = self.readable_since else {
            let text = "the API server to report the changed record, which takes a few seconds. If it takes \
                        longer, install this version's definition of SkeinNode: kubectl apply -f \
                        charts/skein/crds";
            return Some(text.to_owned());
        };
        let left = self.settings.settle.saturating_sub(readable_since.elapsed());
        Some(match self.stage() {
            Stage::Changed if left.is_zero() && self.old_key_peers > 0 => {
                let peers = match self.old_key_peers {
                    1 => "1 peer that still uses".to_owned(),
                    count => format!("{count} peers that still use"),
                };
                format!("{peers} the old key, one day at most")
            }
            _ => format!("the other nodes to read the record, {} s more", left.as_secs()),
        })
    }

    /// Returns the age of the active key, from the modification time of its file.
    fn age(&self) -> Duration {
        let made = std::fs::metadata(&self.path).and_then(|found| found.modified());
        // A modification time in the future, after the clock was set back, counts as age 0.
        made.ok().and_then(|made| SystemTime::now().duration_since(made).ok()).unwrap_or_default()
    }

    /// Returns `every` plus up to a tenth, depending on the key, because the nodes of a cluster are
    /// often created within an hour and must not rotate their keys within the same hour.
    fn with_spread(&self, every: Duration) -> Duration {
        every + every / 10 * u32::from(self.public.first.0[0]) / 256
    }

    /// Returns the time at which [`Rotation::step`] can perform the next step; `None` if no step is
    /// due by time.
    pub fn deadline(&self) -> Option<Instant> {
        let settled = self.readable_since? + self.settings.settle;
        (self.stage() != Stage::Steady && settled > Instant::now()).then_some(settled)
    }

    /// Starts a rotation. With `at_once`, performs all steps immediately and in any stage. The keys
    /// may have changed even if an error is returned.
    ///
    /// # Errors
    /// [`Failure::InUse`] if a rotation is active; [`Failure::Usage`] for `at_once` if the agent
    /// does not write the node records; another [`Failure`] if a key file cannot be written.
    pub fn begin(&mut self, at_once: bool) -> Result<(), Failure> {
        let result = self.try_begin(at_once);
        if result.is_err() {
            self.reload();
        }
        result
    }

    fn try_begin(&mut self, at_once: bool) -> Result<(), Failure> {
        if self.stage() != Stage::Steady && !at_once {
            let stage = self.stage().label();
            return Err(Failure::InUse(format!("the key is being changed already ({stage})")));
        }
        if at_once && !self.writes_record {
            return Err(Failure::Usage(
                "a rotation at once needs node records that the agent writes (kubernetes.enabled). \
                 Without them, start a rotation, then set public_key to the next key in this node's \
                 record on every node, without second_public_key."
                    .to_owned(),
            ));
        }
        if at_once {
            // A thief of the active key may have the second one as well.
            second_key_paths(&self.path).iter().try_for_each(|other| remove(other))?;
        }
        self.announce()?;
        if at_once {
            self.switch_keys()?;
            self.remove_old_key()?;
        }
        Ok(())
    }

    /// Performs the next step if it is due. `record` has the keys of this node's record as the
    /// peers can read it; `None` if there is no record. `old_key_peers` is the number of peers that
    /// still use the old key. The keys may have changed even if an error is returned.
    ///
    /// # Errors
    /// [`Failure`] if a key file cannot be written, renamed or removed.
    pub fn step(
        &mut self,
        record: Option<PublicKeys>,
        old_key_peers: usize,
    ) -> Result<(), Failure> {
        self.old_key_peers = old_key_peers;
        let result = self.try_step(record);
        if result.is_err() {
            self.reload();
        }
        result
    }

    fn try_step(&mut self, record: Option<PublicKeys>) -> Result<(), Failure> {
        let PublicKeys { first, second } = self.public;
        let settled = match record {
            Some(record) if self.writes_record && record == self.public => {
                let waited = self.readable_since.get_or_insert_with(Instant::now).elapsed();
                let waits = self.stage() == Stage::Changed
                    && self.old_key_peers > 0
                    && waited < MAX_OLD_KEY_WAIT;
                waited >= self.settings.settle && !waits
            }
            _ => {
                self.readable_since = None;
                false
            }
        };
        match self.stage() {
            Stage::Steady => {
                self.readable_since = None;
                let old =
                    self.settings.every.is_some_and(|every| self.age() >= self.with_spread(every));
                if !(old && self.writes_record && record == Some(self.public)) {
                    return Ok(());
                }
                tracing::info!(
                    age_seconds = self.age().as_secs(),
                    "key rotation: maximum age reached"
                );
                self.announce()
            }
            Stage::Announced => {
                let asked = record.is_some_and(|record| Some(record.first) == second);
                if settled || asked { self.switch_keys() } else { Ok(()) }
            }
            Stage::Changed => {
                let asked = !self.writes_record && record == Some(first.into());
                if settled || asked { self.remove_old_key() } else { Ok(()) }
            }
        }
    }

    fn announce(&mut self) -> Result<(), Failure> {
        let key = PrivateKey::generate().context("cannot generate a private key")?;
        identity::store(&next_path(&self.path), &key)?;
        self.set_second(Some((Stage::Announced, key)))?;
        tracing::info!(next_key = ?self.public.second, "key rotation: next key announced");
        Ok(())
    }

    /// Makes the next key the active one. If the process ends between the two steps on the disk,
    /// one of the keys is active and the other one is stored as the second key.
    fn switch_keys(&mut self) -> Result<(), Failure> {
        let (next, previous) = (next_path(&self.path), previous_path(&self.path));
        if !previous.exists() {
            identity::store(&previous, &self.current)?;
        }
        std::fs::rename(&next, &self.path)
            .and_then(|()| sync_beside(&self.path))
            .map_err(|error| Failure::io(format!("cannot rename {}", next.display()), error))?;
        let Some((_, key)) = self.second.take() else { return Ok(()) };
        let before = std::mem::replace(&mut self.current, key);
        self.set_second(Some((Stage::Changed, before)))?;
        tracing::info!(active_key = %self.public.first, "key rotation: new key active");
        Ok(())
    }

    fn remove_old_key(&mut self) -> Result<(), Failure> {
        remove(&previous_path(&self.path))?;
        self.set_second(None)?;
        tracing::info!(active_key = %self.public.first, "key rotation: old key removed");
        Ok(())
    }

    fn set_second(&mut self, second: Option<(Stage, PrivateKey)>) -> Result<(), Failure> {
        self.public = public_keys(&self.current, second.as_ref())?;
        self.second = second;
        self.readable_since = None;
        Ok(())
    }
}

fn public_keys(
    current: &PrivateKey,
    second: Option<&(Stage, PrivateKey)>,
) -> Result<PublicKeys, Failure> {
    let public = |key: &PrivateKey| key.public().context("cannot compute the public key");
    let second = second.map(|(_, key)| public(key)).transpose()?;
    Ok(PublicKeys { first: public(current)?, second })
}

#[cfg(test)]
mod tests;
