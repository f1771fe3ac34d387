#![allow(clippy::unwrap_used)]

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

/// Performs a step and returns the stage after it.
fn step(rotation: &mut Rotation, record: Option<PublicKeys>) -> Stage {
    rotation.step(record, 0).unwrap();
    rotation.stage()
}

#[test]
fn rotation_follows_record_of_operator() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path(), "");
    let mut rotation = Rotation::load(&config).unwrap();
    let old = rotation.public().first;
    assert_eq!(step(&mut rotation, Some(old.into())), Stage::Steady);
    assert!(matches!(rotation.begin(true), Err(Failure::Usage(_))));
    rotation.begin(false).unwrap();
    let new = rotation.public().second.unwrap();
    assert!(matches!(rotation.begin(false), Err(Failure::InUse(_))));
    assert!(rotation.status().waits_for.unwrap().contains(&new.to_string()));
    let keys = |first, second| Some(PublicKeys { first, second });
    // After the announcement the rotation waits. A restarted agent continues in the same stage.
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
async fn steps_wait_for_settle_time_in_kubernetes() {
    let directory = tempfile::tempdir().unwrap();
    let mut rotation = in_kubernetes(directory.path(), "");
    let old = rotation.public().first;
    rotation.begin(false).unwrap();
    for stage in [Stage::Announced, Stage::Changed] {
        // No peer can have read the record yet.
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
async fn old_key_waits_for_its_peers_for_one_day_at_most() {
    let directory = tempfile::tempdir().unwrap();
    let mut rotation = in_kubernetes(directory.path(), "");
    rotation.begin(false).unwrap();
    // Peers that use the old key delay only the last step.
    for _ in [Stage::Announced, Stage::Changed] {
        let record = Some(rotation.public());
        rotation.step(record, 3).unwrap();
        tokio::time::advance(SETTLE).await;
        rotation.step(record, 3).unwrap();
        assert_eq!(rotation.stage(), Stage::Changed);
    }
    assert!(rotation.status().waits_for.unwrap().starts_with("3 peers"));
    rotation.step(Some(rotation.public()), 1).unwrap();
    assert!(rotation.status().waits_for.unwrap().starts_with("1 peer that"));
    assert_eq!(rotation.deadline(), None);
    tokio::time::advance(MAX_OLD_KEY_WAIT).await;
    rotation.step(Some(rotation.public()), 3).unwrap();
    assert_eq!(rotation.stage(), Stage::Steady);
}

#[test]
fn rotation_at_once_removes_both_keys() {
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

/// After a failed step the keys on the disk are active, and the next step continues.
#[test]
fn failed_step_is_repeated() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path(), "");
    let path = config.key_path();
    let mut rotation = Rotation::load(&config).unwrap();
    let old = rotation.public().first;
    // A directory blocks the path of the next key.
    std::fs::create_dir(next_path(&path)).unwrap();
    assert!(rotation.begin(false).is_err());
    assert_eq!(rotation.public(), old.into());
    std::fs::remove_dir(next_path(&path)).unwrap();
    rotation.begin(false).unwrap();
    let new = rotation.public().second.unwrap();
    // The next key was activated, but the step did not finish.
    identity::store(&previous_path(&path), rotation.keys().current).unwrap();
    std::fs::rename(next_path(&path), &path).unwrap();
    assert!(rotation.step(Some(new.into()), 0).is_err());
    assert_eq!(rotation.public(), PublicKeys { first: new, second: Some(old) });
    // Another program has removed the old key.
    std::fs::remove_file(previous_path(&path)).unwrap();
    assert_eq!(step(&mut rotation, Some(new.into())), Stage::Steady);
    assert_eq!(rotation.public(), new.into());
    // A killed agent leaves the temporary file of a key.
    std::fs::write(directory.path().join("node.key.previous.new-7"), "old").unwrap();
    Rotation::load(&config).unwrap();
    assert_eq!(files(directory.path()), ["node.key"]);
}

#[test]
fn key_is_rotated_at_its_maximum_age() {
    let directory = tempfile::tempdir().unwrap();
    let mut rotation = in_kubernetes(directory.path(), "every_days = 30");
    let record = Some(rotation.public());
    assert_eq!(step(&mut rotation, record), Stage::Steady);
    let key = std::fs::File::open(directory.path().join("node.key")).unwrap();
    let day = Duration::from_secs(86_400);
    key.set_modified(SystemTime::now() - 29 * day).unwrap();
    assert_eq!(step(&mut rotation, record), Stage::Steady);
    // The maximum age is up to a tenth higher, depending on the key.
    key.set_modified(SystemTime::now() - 33 * day).unwrap();
    assert_eq!(
        step(&mut rotation, None),
        Stage::Steady,
        "the record of this node is not published yet"
    );
    assert_eq!(step(&mut rotation, record), Stage::Announced);
    // A creation time in the future, as after a clock was set back.
    key.set_modified(SystemTime::now() + day).unwrap();
    assert_eq!(rotation.age(), Duration::ZERO);
}

#[test]
fn interrupted_step_leaves_both_keys() {
    let directory = tempfile::tempdir().unwrap();
    let config = config(directory.path(), "");
    let mut rotation = Rotation::load(&config).unwrap();
    rotation.begin(false).unwrap();
    let keys = rotation.public();
    // The agent ended before the rename.
    identity::store(&previous_path(&config.key_path()), rotation.keys().current).unwrap();
    let rotation = Rotation::load(&config).unwrap();
    assert_eq!((rotation.stage(), rotation.public()), (Stage::Announced, keys));
    // Only an operator can leave both a next and a previous key.
    let other = PrivateKey::generate().unwrap();
    identity::store(&previous_path(&config.key_path()), &other).unwrap();
    assert!(matches!(Rotation::load(&config), Err(Failure::Usage(_))));
}
