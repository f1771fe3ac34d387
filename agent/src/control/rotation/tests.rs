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
    tokio::time::advance(MAX_OLD_KEY_WAIT).await;
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
    std::fs::create_dir(next_path(&path)).unwrap();
    assert!(rotation.begin(false).is_err());
    assert_eq!(rotation.public(), old.into());
    std::fs::remove_dir(next_path(&path)).unwrap();
    rotation.begin(false).unwrap();
    let new = rotation.public().second.unwrap();
    // The next key took the old one's place, but that was not all.
    identity::store(&previous_path(&path), rotation.keys().current).unwrap();
    std::fs::rename(next_path(&path), &path).unwrap();
    assert!(rotation.step(Some(new.into()), 0).is_err());
    assert_eq!(rotation.public(), PublicKeys { first: new, second: Some(old) });
    // Somebody has removed the old one already.
    std::fs::remove_file(previous_path(&path)).unwrap();
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
    identity::store(&previous_path(&config.key_path()), rotation.keys().current).unwrap();
    let rotation = Rotation::load(&config).unwrap();
    assert_eq!((rotation.stage(), rotation.public()), (Stage::Announced, keys));
    // Two changes at once are nobody's work but an operator's.
    let other = PrivateKey::generate().unwrap();
    identity::store(&previous_path(&config.key_path()), &other).unwrap();
    assert!(matches!(Rotation::load(&config), Err(Failure::Usage(_))));
}
