//! Changing this node's key while traffic goes on.
//!
//! The next key is made and *announced*: the node's record names it beside the one in force, and from then
//! on every node accepts both. Later the two change places (*changed*): handshakes begin with the new key,
//! and the old one is still good, for those who have not heard. At last the old one is given up, in the
//! record and here. In Kubernetes the agent writes the record and waits between the steps; elsewhere an
//! operator writes it, and the agent follows.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::identity;
use crate::config::{Config, KeyRotation};
use crate::failure::Failure;
use crate::keys::{PrivateKey, PublicKey, PublicKeys};

/// Somebody asks for another key.
#[derive(Debug)]
pub struct RotationRequest {
    /// The old one is to be good for nothing any more.
    pub at_once: bool,
    /// Where the state that this leads to goes, or why nothing comes of it.
    pub answer: oneshot::Sender<Result<RotationStatus, String>>,
}

/// Where to ask.
pub type Ask = mpsc::Sender<RotationRequest>;

/// How far a change of the key has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// There is one key.
    Steady,
    /// The next key is accepted by whoever knows of it.
    Announced,
    /// The new key is in force, and the old one still accepted.
    Changed,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Steady, Self::Announced, Self::Changed];

    /// The value of the metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Stage::Steady => "steady",
            Stage::Announced => "announced",
            Stage::Changed => "changed",
        }
    }
}

/// What the status shows of the key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationStatus {
    /// How far a change has come.
    pub stage: Stage,
    /// The key in force, and the next or the one before.
    pub keys: PublicKeys,
    /// Seconds since the key in force was made.
    pub age_seconds: u64,
    /// What has to happen before the change goes on, for people; `None` where there is none.
    pub waits_for: Option<String>,
}

impl RotationStatus {
    /// Of a node with one key.
    pub fn of(key: PublicKey) -> Self {
        Self { stage: Stage::Steady, keys: key.into(), age_seconds: 0, waits_for: None }
    }
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
    told: Option<Instant>,
}

impl Rotation {
    /// Reads the keys; makes one where there is to be one and is none.
    pub fn load(config: &Config) -> Result<Self, Failure> {
        let path = config.key_path();
        let current = identity::for_node(config)?;
        let mut previous = identity::load(&previous(&path))?;
        if previous.as_ref() == Some(&current) {
            // The agent ended before the next key took the place of this one.
            remove(&self::previous(&path))?;
            previous = None;
        }
        let second = match (identity::load(&next(&path))?, previous) {
            (Some(next), _) => Some((Stage::Announced, next)),
            (None, Some(previous)) => Some((Stage::Changed, previous)),
            (None, None) => None,
        };
        let mut rotation = Self {
            path,
            settings: config.key_rotation,
            writes_record: config.kubernetes.enabled,
            public: public_keys(&current, second.as_ref())?,
            current,
            second,
            told: None,
        };
        rotation.check()?;
        Ok(rotation)
    }

    /// Two changes at a time there are not.
    fn check(&mut self) -> Result<(), Failure> {
        let (next, previous) = (next(&self.path), previous(&self.path));
        if next.exists() && previous.exists() {
            return Err(Failure::Usage(format!(
                "there are both {} and {}: remove the one that no node record names",
                next.display(),
                previous.display()
            )));
        }
        Ok(())
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
        let second = self.public.second.map(|key| key.to_string()).unwrap_or_default();
        let left = self.told.map(|told| {
            let left = self.settings.settle.saturating_sub(told.elapsed());
            format!("the other nodes to read the record, {} s more", left.as_secs())
        });
        let record = "this node's record on every node";
        let waits_for = match (self.stage(), self.writes_record) {
            (Stage::Steady, _) => None,
            (_, true) => {
                Some(left.unwrap_or_else(|| "the API server to take the record".to_owned()))
            }
            (Stage::Announced, false) => Some(format!(
                "{record}: second_public_key = \"{second}\" first, and when all have it, that as \
                 public_key and \"{}\" as second_public_key",
                self.public.first
            )),
            (Stage::Changed, false) => {
                Some(format!("{record}: leave second_public_key out after three minutes"))
            }
        };
        let age_seconds = self.age().as_secs();
        RotationStatus { stage: self.stage(), keys: self.public, age_seconds, waits_for }
    }

    /// How old the key in force is, by its file.
    fn age(&self) -> Duration {
        let made = std::fs::metadata(&self.path).and_then(|found| found.modified());
        // A clock that is behind makes no key old.
        made.ok().and_then(|made| SystemTime::now().duration_since(made).ok()).unwrap_or_default()
    }

    /// When to call [`Rotation::step`] though nothing else has happened.
    pub fn deadline(&self) -> Option<Instant> {
        self.told.map(|told| told + self.settings.settle)
    }

    /// Begins a change, on demand.
    pub fn begin(&mut self, at_once: bool) -> Result<(), Failure> {
        if self.stage() != Stage::Steady {
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
        self.announce()?;
        if at_once {
            self.change()?;
            self.give_up()?;
        }
        Ok(())
    }

    /// Goes on where the others know enough. `record`: the keys of this node's record as the other nodes
    /// can read it, where there is one. Says whether the keys have changed.
    pub fn step(&mut self, record: Option<PublicKeys>) -> Result<bool, Failure> {
        let PublicKeys { first, second } = self.public;
        let settled = match record {
            Some(record) if self.writes_record && record == self.public => {
                self.told.get_or_insert_with(Instant::now).elapsed() >= self.settings.settle
            }
            _ => {
                self.told = None;
                false
            }
        };
        match self.stage() {
            Stage::Steady => {
                self.told = None;
                let old = self.settings.every.is_some_and(|every| self.age() >= every);
                if !(old && self.writes_record && record == Some(self.public)) {
                    return Ok(false);
                }
                tracing::info!(age_seconds = self.age().as_secs(), "the key is old: it is changed");
                self.announce()?;
            }
            Stage::Announced => {
                if !settled && record.map(|record| record.first) != second {
                    return Ok(false);
                }
                self.change()?;
            }
            Stage::Changed => {
                let alone = PublicKeys { first, second: None };
                if !settled && (self.writes_record || record != Some(alone)) {
                    return Ok(false);
                }
                self.give_up()?;
            }
        }
        Ok(true)
    }

    fn announce(&mut self) -> Result<(), Failure> {
        let key = PrivateKey::generate().context("cannot make a private key")?;
        identity::store(&next(&self.path), &key)?;
        self.become_(Some((Stage::Announced, key)))?;
        tracing::info!(next = ?self.public.second, "the next key is announced");
        Ok(())
    }

    fn change(&mut self) -> Result<(), Failure> {
        let Some((Stage::Announced, key)) = self.second.take() else { return Ok(()) };
        let result = self.change_files();
        if let Err(failure) = result {
            self.second = Some((Stage::Announced, key));
            return Err(failure);
        }
        let before = std::mem::replace(&mut self.current, key);
        self.become_(Some((Stage::Changed, before)))?;
        tracing::info!(key = %self.public.first, "the new key is in force");
        Ok(())
    }

    /// Whatever comes between them, one of both keys is in force and the other is known.
    fn change_files(&self) -> Result<(), Failure> {
        let (next, previous) = (next(&self.path), previous(&self.path));
        if !previous.exists() {
            identity::store(&previous, &self.current)?;
        }
        std::fs::rename(&next, &self.path)
            .and_then(|()| sync_beside(&self.path))
            .map_err(|error| Failure::io(format!("cannot rename {}", next.display()), error))
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

/// Where the next key lies, beside the one in force.
fn next(path: &Path) -> PathBuf {
    added(path, ".next")
}

/// Where the key before lies.
fn previous(path: &Path) -> PathBuf {
    added(path, ".previous")
}

fn added(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// The files beside a key's that a change of it may leave.
pub fn beside(path: &Path) -> [PathBuf; 2] {
    [next(path), previous(path)]
}

fn remove(path: &Path) -> Result<(), Failure> {
    std::fs::remove_file(path)
        .and_then(|()| sync_beside(path))
        .map_err(|error| Failure::io(format!("cannot remove {}", path.display()), error))
}

fn sync_beside(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn config(directory: &Path, more: &str) -> Config {
        Config::parse(&format!("name = 'a'\nstate_dir = {directory:?}\n{more}")).unwrap()
    }

    fn files(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn an_operator_leads_it_by_the_record() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path(), "");
        let mut rotation = Rotation::load(&config).unwrap();
        let old = rotation.public().first;
        assert!(!rotation.step(Some(old.into())).unwrap());
        assert!(matches!(rotation.begin(true), Err(Failure::Usage(_))));
        rotation.begin(false).unwrap();
        let new = rotation.public().second.unwrap();
        assert!(matches!(rotation.begin(false), Err(Failure::Taken(_))));
        assert!(rotation.status().waits_for.unwrap().contains(&new.to_string()));
        let keys = |first, second| Some(PublicKeys { first, second });
        // Announced to the others: it waits. An agent that is started anew goes on where it was.
        for record in [None, keys(old, None), keys(old, Some(new))] {
            assert!(!rotation.step(record).unwrap());
            rotation = Rotation::load(&config).unwrap();
            assert_eq!((rotation.stage(), rotation.public().first), (Stage::Announced, old));
        }
        assert!(rotation.step(keys(new, Some(old))).unwrap());
        for record in [keys(new, Some(old)), keys(old, Some(new)), None] {
            assert_eq!(rotation.public(), PublicKeys { first: new, second: Some(old) });
            assert!(!rotation.step(record).unwrap());
            rotation = Rotation::load(&config).unwrap();
            assert_eq!(rotation.stage(), Stage::Changed);
        }
        assert!(rotation.step(keys(new, None)).unwrap());
        assert_eq!(rotation.public(), PublicKeys::from(new));
        assert_eq!(files(directory.path()), ["node.key"]);
        assert_eq!(Rotation::load(&config).unwrap().public(), new.into());
    }

    #[tokio::test(start_paused = true)]
    async fn the_agent_waits_between_the_steps_where_it_writes_the_record() {
        let directory = tempfile::tempdir().unwrap();
        let settings = "[kubernetes]\nenabled = true\n[key_rotation]\nsettle_seconds = 60";
        let mut rotation = Rotation::load(&config(directory.path(), settings)).unwrap();
        let old = rotation.public().first;
        rotation.begin(false).unwrap();
        for stage in [Stage::Announced, Stage::Changed] {
            assert_eq!(rotation.stage(), stage);
            // Nobody can have read it yet.
            for stale in [None, Some(PublicKeys::from(old))] {
                assert!(!rotation.step(stale).unwrap());
                tokio::time::advance(Duration::from_secs(100)).await;
            }
            let record = rotation.public();
            assert!(!rotation.step(Some(record)).unwrap());
            assert_eq!(rotation.deadline(), Some(Instant::now() + Duration::from_secs(60)));
            tokio::time::advance(Duration::from_secs(59)).await;
            assert!(!rotation.step(Some(record)).unwrap());
            tokio::time::advance(Duration::from_secs(1)).await;
            assert!(rotation.step(Some(record)).unwrap());
        }
        assert_eq!((rotation.stage(), rotation.deadline()), (Stage::Steady, None));
        assert_ne!(rotation.public().first, old);
        rotation.begin(true).unwrap();
        assert_eq!(rotation.stage(), Stage::Steady, "at once");
        assert_eq!(files(directory.path()), ["node.key"]);
    }

    #[test]
    fn a_key_is_changed_when_it_is_old() {
        let directory = tempfile::tempdir().unwrap();
        let settings = "[kubernetes]\nenabled = true\n[key_rotation]\nevery_days = 30";
        let mut rotation = Rotation::load(&config(directory.path(), settings)).unwrap();
        let record = Some(rotation.public());
        assert!(!rotation.step(record).unwrap());
        let key = File::open(directory.path().join("node.key")).unwrap();
        let day = Duration::from_secs(86_400);
        key.set_modified(SystemTime::now() - 29 * day).unwrap();
        assert!(!rotation.step(record).unwrap());
        key.set_modified(SystemTime::now() - 30 * day).unwrap();
        assert!(!rotation.step(None).unwrap(), "nobody knows this node yet");
        assert!(rotation.step(record).unwrap());
        assert_eq!(rotation.stage(), Stage::Announced);
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
        let mut rotation = Rotation::load(&config).unwrap();
        assert_eq!((rotation.stage(), rotation.public()), (Stage::Announced, keys));
        let next: PublicKey = keys.second.unwrap();
        assert!(rotation.step(Some(next.into())).unwrap());
        // Two changes at once are nobody's work but an operator's.
        identity::store(&super::next(&config.key_path()), rotation.keys().0).unwrap();
        assert!(matches!(Rotation::load(&config), Err(Failure::Usage(_))));
    }
}
