//! Store as a file: access rights, exclusive use, kills, damage, and a full file system.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::*;

const POOL: &str = "10.1.0.0/16";
/// Environment variable with the path that a child process gets: the file of leases, or a directory
/// for the file.
const PATH_VARIABLE: &str = "SKEIN_TEST_LEASES";

fn open(path: &Path) -> Ipam {
    let Opened { mut ipam, damaged } = Ipam::open(path).unwrap();
    assert_eq!(damaged, None);
    ipam.set_pools(&cidrs(&[POOL]), &[]);
    ipam
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Returns a command that runs an ignored test of this module in a child process. The child gets
/// `path` in [`PATH_VARIABLE`].
fn child(test: &str, path: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.arg(format!("tests::file::{test}"));
    command.env(PATH_VARIABLE, path).stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

#[test]
fn file_is_accessible_to_its_owner_only() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state").join(FILE);
    let mut ipam = open(&path);
    assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
    let lease = ipam.allocate(request("a"), at(0)).unwrap();
    let error = Ipam::open(&path).unwrap_err().to_string();
    assert!(error.contains("another process uses it") && error.contains("leases.redb"), "{error}");
    drop(ipam);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(open(&path).get(&lease.id), Some(&lease));
    assert_eq!(mode(&path), 0o600);
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn interrupted_creation_leaves_no_partial_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("leases.redb");
    std::fs::write(directory.path().join("leases.redb.new"), b"half").unwrap();
    open(&path).allocate(request("a"), at(0)).unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn newer_schema_is_refused_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("leases.redb");
    drop(open(&path));
    let database = redb::Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    let meta = redb::TableDefinition::<&str, u64>::new("meta");
    transaction.open_table(meta).unwrap().insert("schema", 2).unwrap();
    transaction.commit().unwrap();
    drop(database);
    for _ in 0..2 {
        let error = Ipam::open(&path).unwrap_err();
        assert!(matches!(error.error, StoreError::Newer { found: 2, known: 1 }), "{error}");
        assert!(error.to_string().contains("drain the node"), "{error}");
    }
}

#[test]
fn damaged_file_is_moved_aside() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("leases.redb");
    let mut ipam = open(&path);
    for n in 0..50 {
        ipam.allocate(request(&n.to_string()), at(0)).unwrap();
    }
    let leases: Vec<_> = ipam.list().cloned().collect();
    drop(ipam);
    let sound = std::fs::read(&path).unwrap();
    let check = |what: &str, content: &[u8]| {
        std::fs::write(&path, content).unwrap();
        let Opened { mut ipam, damaged } =
            Ipam::open(&path).unwrap_or_else(|error| panic!("{what}: {error}"));
        match &damaged {
            // Content does not depend on this byte.
            None => assert!(ipam.list().eq(leases.iter()), "{what}"),
            Some(damaged) => {
                assert_eq!(damaged.path, directory.path().join("leases.redb.damaged"));
                assert_eq!(ipam.list().len(), 0, "{what}");
                ipam.set_pools(&cidrs(&[POOL]), &[]);
                ipam.adopt(leases[0].clone(), at(0)).unwrap();
            }
        }
        damaged.is_some()
    };
    for (what, content) in [
        ("empty", &b""[..]),
        ("text", &b"not a database at all"[..]),
        ("zeros", &vec![0; sound.len()][..]),
        ("its first page alone", &sound[..4096]),
        ("its first half", &sound[..sound.len() / 2]),
        ("its second half", &sound[sound.len() / 2..]),
    ] {
        assert!(check(what, content), "{what}");
    }
    // Change single bytes: all in the first pages, and samples in the rest.
    let mut found = 0;
    for n in 0..300 {
        let mut content = sound.clone();
        let place = if n < 150 { n * 3 } else { n * 7919 % content.len() };
        content[place] ^= 1 << (n % 8);
        found += u32::from(check(&format!("byte {place}"), &content));
    }
    assert!(found > 20, "{found}");
}

/// Allocates and releases until the process is killed, and prints each outcome.
#[test]
#[ignore = "part of another test"]
fn child_that_allocates_and_releases() {
    let mut ipam = open(Path::new(&std::env::var_os(PATH_VARIABLE).unwrap()));
    let mut out = std::io::stdout().lock();
    let mut tell = |text: String| {
        writeln!(out, "\n{text}").unwrap();
        out.flush().unwrap();
    };
    let mut n = ipam.list().filter_map(|lease| lease.id.container_id.parse().ok()).max();
    loop {
        let next = n.map_or(0_u64, |n| n + 1);
        n = Some(next);
        tell(format!("asking {next}"));
        let lease = ipam.allocate(request(&next.to_string()), at(next)).unwrap();
        tell(format!("leased {next} {}", shown(&lease)));
        if let Some(old) = next.checked_sub(5) {
            tell(format!("freeing {old}"));
            ipam.release(&id(&old.to_string()), at(next)).unwrap();
            tell(format!("freed {old}"));
        }
    }
}

/// Child process that is killed on drop, also if the test fails.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn leases_survive_a_kill_at_any_time() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("leases.redb");
    drop(open(&path));
    let mut told = std::collections::BTreeMap::<String, Option<String>>::new();
    let mut total = 0;
    for round in 0..20_u64 {
        let mut process =
            Killed(child("child_that_allocates_and_releases", &path).spawn().unwrap());
        let mut lines = BufReader::new(process.0.stdout.take().unwrap()).lines();
        let (mut deadline, mut doubtful) = (None::<Instant>, None);
        while let Some(Ok(line)) = lines.next() {
            let words: Vec<_> = line.split(' ').collect();
            match words[..] {
                ["asking" | "freeing", who] => doubtful = Some(who.to_owned()),
                ["leased", who, ip] => drop(told.insert(who.to_owned(), Some(ip.to_owned()))),
                ["freed", who] => drop(told.insert(who.to_owned(), None)),
                _ => continue,
            }
            if matches!(words[0], "leased" | "freed") {
                (doubtful, total) = (None, total + 1);
            }
            // The delay starts with the child's first output and differs in each round. Output up
            // to the kill is read completely.
            let begun = *deadline.get_or_insert_with(Instant::now);
            if begun.elapsed() >= Duration::from_micros(round * 7_919 % 60_000) {
                process.0.kill().unwrap();
            }
        }
        drop(process);
        let ipam = open(&path);
        let mut ips = std::collections::BTreeSet::new();
        assert!(
            ipam.list().flat_map(Lease::ips).all(|ip| ips.insert(ip)),
            "An address has two leases."
        );
        for (who, expected) in &told {
            let found = ipam.get(&id(who)).map(shown);
            if doubtful.as_ref() != Some(who) {
                assert_eq!(found, *expected, "round {round}: {who}");
            }
        }
        for lease in ipam.list() {
            let who = &lease.id.container_id;
            assert!(told.contains_key(who) || doubtful.as_ref() == Some(who), "{lease:?}");
        }
        // The outcome is known now.
        if let Some(who) = doubtful {
            let found = ipam.get(&id(&who)).map(shown);
            told.insert(who, found);
        }
    }
    assert!(total > 20, "Only {total} operations were answered.");
}

/// Fills a file system of 1 MiB in a mount namespace of its own.
#[test]
#[ignore = "part of another test"]
fn child_that_fills_its_file_system() {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    let directory = PathBuf::from(std::env::var_os(PATH_VARIABLE).unwrap());
    // The mount namespace belongs to this process and ends with it.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    mount("tmpfs", &directory, "tmpfs", MountFlags::empty(), c"size=1m").unwrap();
    let path = directory.join("leases.redb");
    let mut ipam = open(&path);
    let mut answered = Vec::new();
    for n in 0..10 {
        answered.push(ipam.allocate(request(&n.to_string()), at(0)).unwrap());
    }
    let ballast = directory.join("ballast");
    let fill = || {
        let mut file = std::fs::File::create(&ballast).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    };
    fill();
    let error = (10..10_000)
        .find_map(|n| match ipam.allocate(request(&n.to_string()), at(0)) {
            Ok(lease) => {
                answered.push(lease);
                None
            }
            Err(error) => Some(error),
        })
        .unwrap();
    assert!(error.to_string().contains("no space left"), "{error}");
    assert_eq!(ipam.list().len(), answered.len());
    let _ = ipam.release(&answered[0].id, at(1));
    std::fs::remove_file(&ballast).unwrap();
    ipam.release(&answered[0].id, at(1)).unwrap();
    ipam.allocate(request("after"), at(1)).unwrap();
    drop(ipam);
    let ipam = open(&path);
    assert!(answered[1..].iter().all(|lease| ipam.get(&lease.id) == Some(lease)));
    assert_eq!(ipam.list().len(), answered.len());
}

#[test]
fn full_file_system_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let inner = child("child_that_fills_its_file_system", directory.path());
    let mut command = Command::new("unshare");
    command.args(["--mount", "--"]).arg(inner.get_program()).args(inner.get_args());
    command.env(PATH_VARIABLE, directory.path());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
}
