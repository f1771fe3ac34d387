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

use self::files::{beside, next, previous, read_second, remove};
use super::identity;
use crate::config::{Config, KeyRotation};
use crate::failure::Failure;
use crate::files::sync_beside;
use crate::status::{RotationStatus, Stage};

/// How long peers that do not use the new key hold up the end of the old one: one that is out of the API
/// server's reach knows the old one alone, and one that is not honest would say so for ever.
const HELD: Duration = Duration::from_secs(86_400);

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
pub type Ask = mpsc::Sender<RotationRequest>;

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
    told: Option<Instant>,
    /// How many peers still use the old key.
    held: usize,
}

impl Rotation {
    /// Reads the keys; makes one where there is to be one and is none.
    pub fn load(config: &Config) -> Result<Self, Failure> {
        let path = config.key_path();
        let current = identity::for_node(config)?;
        files::sweep(&path);
        let second = read_second(&path, &current)?;
        Ok(Self {
            path,
            settings: config.key_rotation,
            writes_record: config.kubernetes.enabled,
            public: public_keys(&current, second.as_ref())?,
            current,
            second,
            told: None,
            held: 0,
        })
    }

    /// Whatever step has failed half way: what counts is what the disk has.
    fn read_again(&mut self) {
        self.told = None;
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
    pub fn keys(&self) -> (&PrivateKey, Option<&PrivateKey>) {
        (&self.current, self.second.as_ref().map(|(_, key)| key))
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
        let Some(told) = self.told else {
            let text = "the API server to show the record, a few seconds (or longer? it may not know this \
                        version's definition of SkeinNode: kubectl apply -f charts/skein/crds)";
            return Some(text.to_owned());
        };
        let left = self.settings.settle.saturating_sub(told.elapsed());
        Some(match self.stage() {
            Stage::Changed if left.is_zero() && self.held > 0 => {
                format!("{} peers that do not use the new key yet, a day at most", self.held)
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
    fn spread(&self, every: Duration) -> Duration {
        every + every / 10 * u32::from(self.public.first.0[0]) / 256
    }

    /// When to call [`Rotation::step`] though nothing else has happened. Beyond that it is called every few
    /// seconds anyway.
    pub fn deadline(&self) -> Option<Instant> {
        let settled = self.told? + self.settings.settle;
        (self.stage() != Stage::Steady && settled > Instant::now()).then_some(settled)
    }

    /// Begins a change, on demand; where the old key is to be good for nothing at once, in any stage, and to
    /// its end. The keys may have changed also where it fails.
    pub fn begin(&mut self, at_once: bool) -> Result<(), Failure> {
        let result = self.try_begin(at_once);
        if result.is_err() {
            self.read_again();
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
            beside(&self.path).iter().try_for_each(|other| remove(other))?;
        }
        self.announce()?;
        if at_once {
            self.change()?;
            self.give_up()?;
        }
        Ok(())
    }

    /// Goes on where the others know enough. `record`: the keys of this node's record as the other nodes
    /// can read it, where there is one. `held`: how many peers still use the old key. The keys may have
    /// changed also where it fails.
    pub fn step(&mut self, record: Option<PublicKeys>, held: usize) -> Result<(), Failure> {
        self.held = held;
        let result = self.try_step(record);
        if result.is_err() {
            self.read_again();
        }
        result
    }

    fn try_step(&mut self, record: Option<PublicKeys>) -> Result<(), Failure> {
        let PublicKeys { first, second } = self.public;
        let settled = match record {
            Some(record) if self.writes_record && record == self.public => {
                let told = self.told.get_or_insert_with(Instant::now).elapsed();
                let waits = self.stage() == Stage::Changed && self.held > 0 && told < HELD;
                told >= self.settings.settle && !waits
            }
            _ => {
                self.told = None;
                false
            }
        };
        match self.stage() {
            Stage::Steady => {
                self.told = None;
                let old = self.settings.every.is_some_and(|every| self.age() >= self.spread(every));
                if !(old && self.writes_record && record == Some(self.public)) {
                    return Ok(());
                }
                tracing::info!(age_seconds = self.age().as_secs(), "the key is old: it is changed");
                self.announce()
            }
            Stage::Announced => {
                let asked = record.is_some_and(|record| Some(record.first) == second);
                if settled || asked { self.change() } else { Ok(()) }
            }
            Stage::Changed => {
                let asked = !self.writes_record && record == Some(first.into());
                if settled || asked { self.give_up() } else { Ok(()) }
            }
        }
    }

    fn announce(&mut self) -> Result<(), Failure> {
        let key = PrivateKey::generate().context("cannot make a private key")?;
        identity::store(&next(&self.path), &key)?;
        self.become_(Some((Stage::Announced, key)))?;
        tracing::info!(next = ?self.public.second, "the next key is announced");
        Ok(())
    }

    /// Whatever comes between the two steps on the disk, one of both keys is in force and the other is known.
    fn change(&mut self) -> Result<(), Failure> {
        let (next, previous) = (next(&self.path), previous(&self.path));
        if !previous.exists() {
            identity::store(&previous, &self.current)?;
        }
        std::fs::rename(&next, &self.path)
            .and_then(|()| sync_beside(&self.path))
            .map_err(|error| Failure::io(format!("cannot rename {}", next.display()), error))?;
        let Some((_, key)) = self.second.take() else { return Ok(()) };
        let before = std::mem::replace(&mut self.current, key);
        self.become_(Some((Stage::Changed, before)))?;
        tracing::info!(key = %self.public.first, "the new key is in force");
        Ok(())
    }

    fn give_up(&mut self) -> Result<(), Failure> {
        remove(&previous(&self.path))?;
        self.become_(None)?;
        tracing::info!(key = %self.public.first, "the old key is given up");
        Ok(())
    }

    fn become_(&mut self, second: Option<(Stage, PrivateKey)>) -> Result<(), Failure> {
        self.public = public_keys(&self.current, second.as_ref())?;
        self.second = second;
        self.told = None;
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
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;

    const SETTLE: Duration = Duration::from_secs(300);

    fn config(directory: &Path, more: &str) -> Config {
        Config::parse(&format!("name = 'a'\nstate_dir = {directory:?}\n{more}")).unwrap()
    }

    fn in_kubernetes(directory: &Path, more: &str) -> Rotation {
        let settings = format!("[kubernetes]\nenabled = true\n[key_rotation]\n{more}");
        Rotation::load(&config(directory, &settings)).unwrap()
    }

    fn files(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The stage after a step.
    fn step(rotation: &mut Rotation, record: Option<PublicKeys>) -> Stage {
        rotation.step(record, 0).unwrap();
        rotation.stage()
    }

    #[test]
    fn an_operator_leads_it_by_the_record() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path(), "");
        let mut rotation = Rotation::load(&config).unwrap();
        let old = rotation.public().first;
        assert_eq!(step(&mut rotation, Some(old.into())), Stage::Steady);
        assert!(matches!(rotation.begin(true), Err(Failure::Usage(_))));
        rotation.begin(false).unwrap();
        let new = rotation.public().second.unwrap();
        assert!(matches!(rotation.begin(false), Err(Failure::Taken(_))));
        assert!(rotation.status().waits_for.unwrap().contains(&new.to_string()));
        let keys = |first, second| Some(PublicKeys { first, second });
        // Announced to the others: it waits. An agent that is started anew goes on where it was.
        for record in [None, keys(old, None), keys(old, Some(new))] {
            assert_eq!(step(&mut rotation, record), Stage::Announced);
            rotation = Rotation::load(&config).unwrap();
            assert_eq!((rotation.stage(), rotation.public().first), (Stage::Announced, old));
        }
        assert_eq!(step(&mut rotation, keys(new, Some(old))), Stage::Changed);
        for record in [keys(new, Some(old)), keys(old, Some(new)), None] {
            assert_eq!(rotation.public(), PublicKeys { first: new, second: Some(old) });
            assert_eq!(step(&mut rotation, record), Stage::Changed);
            rotation = Rotation::load(&config).unwrap();
        }
        assert_eq!(step(&mut rotation, keys(new, None)), Stage::Steady);
        assert_eq!(rotation.public(), PublicKeys::from(new));
        assert_eq!(files(directory.path()), ["node.key"]);
        assert_eq!(Rotation::load(&config).unwrap().public(), new.into());
    }

    #[tokio::test(start_paused = true)]
    async fn the_agent_waits_between_the_steps_where_it_writes_the_record() {
        let directory = tempfile::tempdir().unwrap();
        let mut rotation = in_kubernetes(directory.path(), "");
        let old = rotation.public().first;
        rotation.begin(false).unwrap();
        for stage in [Stage::Announced, Stage::Changed] {
            // Nobody can have read it yet.
            for stale in [None, Some(PublicKeys::from(old))] {
                assert_eq!(step(&mut rotation, stale), stage);
                tokio::time::advance(2 * SETTLE).await;
            }
            let record = Some(rotation.public());
            assert_eq!(step(&mut rotation, record), stage);
            assert_eq!(rotation.deadline(), Some(Instant::now() + SETTLE));
            tokio::time::advance(SETTLE - Duration::from_secs(1)).await;
            assert_eq!(step(&mut rotation, record), stage);
            tokio::time::advance(Duration::from_secs(1)).await;
            assert_ne!(step(&mut rotation, record), stage);
        }
        assert_eq!((rotation.stage(), rotation.deadline()), (Stage::Steady, None));
        assert_ne!(rotation.public().first, old);
    }

    #[tokio::test(start_paused = true)]
    async fn peers_that_do_not_use_the_new_key_are_waited_for_but_not_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let mut rotation = in_kubernetes(directory.path(), "");
        rotation.begin(false).unwrap();
        // An announcement holds up nobody.
        for _ in [Stage::Announced, Stage::Changed] {
            let record = Some(rotation.public());
            rotation.step(record, 3).unwrap();
            tokio::time::advance(SETTLE).await;
            rotation.step(record, 3).unwrap();
            assert_eq!(rotation.stage(), Stage::Changed);
        }
        assert!(rotation.status().waits_for.unwrap().starts_with("3 peers"));
        assert_eq!(rotation.deadline(), None);
        tokio::time::advance(HELD).await;
        rotation.step(Some(rotation.public()), 3).unwrap();
        assert_eq!(rotation.stage(), Stage::Steady);
    }

    #[test]
    fn at_once_both_keys_of_a_change_are_given_up() {
        let directory = tempfile::tempdir().unwrap();
        let mut rotation = in_kubernetes(directory.path(), "");
        for stage in [Stage::Steady, Stage::Announced, Stage::Changed] {
            if stage != Stage::Steady {
                rotation.begin(false).unwrap();
            }
            if stage == Stage::Changed {
                let next = rotation.public().second.map(PublicKeys::from);
                step(&mut rotation, next);
            }
            assert_eq!(rotation.stage(), stage);
            let before = rotation.public();
            rotation.begin(true).unwrap();
            assert_eq!(rotation.stage(), Stage::Steady);
            assert!(!before.iter().any(|key| key == rotation.public().first));
            assert_eq!(files(directory.path()), ["node.key"]);
        }
    }

    /// Whatever fails half way, what is in force is what the disk has, and the next try goes on.
    #[test]
    fn a_step_that_fails_is_tried_again() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path(), "");
        let path = config.key_path();
        let mut rotation = Rotation::load(&config).unwrap();
        let old = rotation.public().first;
        // In the way of the next key.
        std::fs::create_dir(next(&path)).unwrap();
        assert!(rotation.begin(false).is_err());
        assert_eq!(rotation.public(), old.into());
        std::fs::remove_dir(next(&path)).unwrap();
        rotation.begin(false).unwrap();
        let new = rotation.public().second.unwrap();
        // The next key took the old one's place, but that was not all.
        identity::store(&previous(&path), rotation.keys().0).unwrap();
        std::fs::rename(next(&path), &path).unwrap();
        assert!(rotation.step(Some(new.into()), 0).is_err());
        assert_eq!(rotation.public(), PublicKeys { first: new, second: Some(old) });
        // Somebody has removed the old one already.
        std::fs::remove_file(previous(&path)).unwrap();
        assert_eq!(step(&mut rotation, Some(new.into())), Stage::Steady);
        assert_eq!(rotation.public(), new.into());
        // What a killed agent leaves of a file that it was writing.
        std::fs::write(directory.path().join("node.key.previous.new-7"), "old").unwrap();
        Rotation::load(&config).unwrap();
        assert_eq!(files(directory.path()), ["node.key"]);
    }

    #[test]
    fn a_key_is_changed_when_it_is_old() {
        let directory = tempfile::tempdir().unwrap();
        let mut rotation = in_kubernetes(directory.path(), "every_days = 30");
        let record = Some(rotation.public());
        assert_eq!(step(&mut rotation, record), Stage::Steady);
        let key = std::fs::File::open(directory.path().join("node.key")).unwrap();
        let day = Duration::from_secs(86_400);
        key.set_modified(SystemTime::now() - 29 * day).unwrap();
        assert_eq!(step(&mut rotation, record), Stage::Steady);
        // Up to a tenth more.
        key.set_modified(SystemTime::now() - 33 * day).unwrap();
        assert_eq!(step(&mut rotation, None), Stage::Steady, "nobody knows this node yet");
        assert_eq!(step(&mut rotation, record), Stage::Announced);
        // Made in the future, as a clock that was set back says.
        key.set_modified(SystemTime::now() + day).unwrap();
        assert_eq!(rotation.age(), Duration::ZERO);
    }

    #[test]
    fn an_agent_that_ends_half_way_has_both_keys() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path(), "");
        let mut rotation = Rotation::load(&config).unwrap();
        rotation.begin(false).unwrap();
        let keys = rotation.public();
        // Ended before the rename.
        identity::store(&previous(&config.key_path()), rotation.keys().0).unwrap();
        let rotation = Rotation::load(&config).unwrap();
        assert_eq!((rotation.stage(), rotation.public()), (Stage::Announced, keys));
        // Two changes at once are nobody's work but an operator's.
        let other = PrivateKey::generate().unwrap();
        identity::store(&previous(&config.key_path()), &other).unwrap();
        assert!(matches!(Rotation::load(&config), Err(Failure::Usage(_))));
    }
}
