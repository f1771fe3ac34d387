//! Changing this node's key while traffic goes on.
//!
//! The next key is made and *announced*: the node's record names it beside the one in force, and from then
//! on every node accepts both. Later the two change places (*changed*): handshakes begin with the new key,
//! and the old one is still good, for those who have not heard. At last the old one is given up, in the
//! record and here. In Kubernetes the agent writes the record and waits between the steps; elsewhere an
//! operator writes it, and the agent follows.

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

/// How long peers that do not use the new key hold up the end of the old one: one that is out of the API
/// server's reach knows the old one alone, and one that is not honest would say so for ever.
const MAX_OLD_KEY_WAIT: Duration = Duration::from_secs(86_400);

/// Somebody asks for another key.
#[derive(Debug)]
pub struct RotationRequest {
    /// The old one is to be good for nothing any more.
    pub at_once: bool,
    /// Where the state that this leads to goes, or why nothing comes of it.
    pub answer: oneshot::Sender<Result<RotationStatus, RotationError>>,
}

/// Reason why a request for another key has no effect.
#[derive(Debug, Error)]
pub enum RotationError {
    /// The agent does not know its node records yet.
    #[error("the agent is still starting")]
    Starting,
    /// The node records cannot be read or written, so that no other node would learn the new key.
    #[error("not at once now: {0}")]
    NoRecords(String),
    /// The agent ends.
    #[error("the agent is ending")]
    Ending,
    /// The change cannot begin, or failed.
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// Where to ask.
pub type RotationSender = mpsc::Sender<RotationRequest>;

/// Private keys of this node.
#[derive(Debug, Clone, Copy)]
pub struct NodeKeys<'a> {
    /// The active key.
    pub current: &'a PrivateKey,
    /// The next or the previous key during a rotation.
    pub second: Option<&'a PrivateKey>,
}

/// The keys of this node, and how far the change from one to the next has come.
#[derive(Debug)]
pub struct Rotation {
    path: PathBuf,
    settings: KeyRotation,
    /// Whether the agent writes this node's record itself.
    writes_record: bool,
    current: PrivateKey,
    second: Option<(Stage, PrivateKey)>,
    public: PublicKeys,
    /// Since when the others can have read what this stage needs them to know, by the monotonic clock: a
    /// leap of the other one would cut off those who have not.
    readable_since: Option<Instant>,
    /// How many peers still use the old key.
    old_key_peers: usize,
}

impl Rotation {
    /// Reads the keys; makes one where there is to be one and is none.
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

    /// Whatever step has failed half way: what counts is what the disk has.
    fn reload(&mut self) {
        self.readable_since = None;
        let read = || -> Result<_, Failure> {
            let current = identity::load(&self.path)?;
            let none = || Failure::Usage(format!("there is no key {}", self.path.display()));
            let current = current.ok_or_else(none)?;
            let second = read_second(&self.path, &current)?;
            Ok((public_keys(&current, second.as_ref())?, current, second))
        };
        match read() {
            Ok((public, current, second)) => {
                (self.public, self.current, self.second) = (public, current, second);
            }
            Err(error) => tracing::error!(%error, "the keys cannot be read: those in force stay"),
        }
    }

    /// The key in force, and the next one or the one before.
    pub fn keys(&self) -> NodeKeys<'_> {
        NodeKeys { current: &self.current, second: self.second.as_ref().map(|(_, key)| key) }
    }

    /// The public halves.
    pub fn public(&self) -> PublicKeys {
        self.public
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.second.as_ref().map_or(Stage::Steady, |(stage, _)| *stage)
    }

    /// For the status.
    pub fn status(&self) -> RotationStatus {
        RotationStatus {
            stage: self.stage(),
            keys: self.public,
            age_seconds: self.age().as_secs(),
            waits_for: self.waits_for(),
        }
    }

    fn waits_for(&self) -> Option<String> {
        let second = self.public.second?;
        let record = "this node's record on every node";
        if !self.writes_record {
            return Some(match self.stage() {
                Stage::Changed => {
                    format!("{record}: leave second_public_key out after three minutes")
                }
                _ => format!(
                    "{record}: second_public_key = \"{second}\" first, and when all have it, that as \
                     public_key and \"{}\" as second_public_key",
                    self.public.first
                ),
            });
        }
        let Some(told) = self.readable_since else {
            let text = "the API server to show the record, a few seconds (or longer? it may not know this \
                        version's definition of SkeinNode: kubectl apply -f charts/skein/crds)";
            return Some(text.to_owned());
        };
        let left = self.settings.settle.saturating_sub(told.elapsed());
        Some(match self.stage() {
            Stage::Changed if left.is_zero() && self.old_key_peers > 0 => {
                format!(
                    "{} peers that do not use the new key yet, a day at most",
                    self.old_key_peers
                )
            }
            _ => format!("the other nodes to read the record, {} s more", left.as_secs()),
        })
    }

    /// How old the key in force is, by its file.
    fn age(&self) -> Duration {
        let made = std::fs::metadata(&self.path).and_then(|found| found.modified());
        // A clock that is behind makes no key old.
        made.ok().and_then(|made| SystemTime::now().duration_since(made).ok()).unwrap_or_default()
    }

    /// Up to a tenth more, for each key another part of it: the nodes of a cluster are made in one hour, and
    /// are not to change their keys in one.
    fn with_spread(&self, every: Duration) -> Duration {
        every + every / 10 * u32::from(self.public.first.0[0]) / 256
    }

    /// When to call [`Rotation::step`] though nothing else has happened. Beyond that it is called every few
    /// seconds anyway.
    pub fn deadline(&self) -> Option<Instant> {
        let settled = self.readable_since? + self.settings.settle;
        (self.stage() != Stage::Steady && settled > Instant::now()).then_some(settled)
    }

    /// Begins a change, on demand; where the old key is to be good for nothing at once, in any stage, and to
    /// its end. The keys may have changed also where it fails.
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
            return Err(Failure::Taken(format!("the key is being changed already ({stage})")));
        }
        if at_once && !self.writes_record {
            return Err(Failure::Usage(
                "at once it goes only where the agent writes the node records (kubernetes.enabled): \
                 here make the next key public_key in this node's record on every node, without a \
                 second_public_key"
                    .to_owned(),
            ));
        }
        if at_once {
            // Whoever has the one key may have the other.
            second_key_paths(&self.path).iter().try_for_each(|other| remove(other))?;
        }
        self.announce()?;
        if at_once {
            self.switch_keys()?;
            self.remove_old_key()?;
        }
        Ok(())
    }

    /// Goes on where the others know enough. `record`: the keys of this node's record as the other nodes
    /// can read it, where there is one. `held`: how many peers still use the old key. The keys may have
    /// changed also where it fails.
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
                let told = self.readable_since.get_or_insert_with(Instant::now).elapsed();
                let waits = self.stage() == Stage::Changed
                    && self.old_key_peers > 0
                    && told < MAX_OLD_KEY_WAIT;
                told >= self.settings.settle && !waits
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
                tracing::info!(age_seconds = self.age().as_secs(), "the key is old: it is changed");
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
        let key = PrivateKey::generate().context("cannot make a private key")?;
        identity::store(&next_path(&self.path), &key)?;
        self.set_second(Some((Stage::Announced, key)))?;
        tracing::info!(next = ?self.public.second, "the next key is announced");
        Ok(())
    }

    /// Whatever comes between the two steps on the disk, one of both keys is in force and the other is known.
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
        tracing::info!(key = %self.public.first, "the new key is in force");
        Ok(())
    }

    fn remove_old_key(&mut self) -> Result<(), Failure> {
        remove(&previous_path(&self.path))?;
        self.set_second(None)?;
        tracing::info!(key = %self.public.first, "the old key is given up");
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
