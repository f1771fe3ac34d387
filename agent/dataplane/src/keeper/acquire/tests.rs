//! Tests of the acquisition. Threads of each test play the other keeper or data process.

#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixListener;

use skein_sys::tun::TunOffload;

use super::*;
use crate::fd_store::StoredFds;
use crate::handover::HandOver;

fn options(directory: &Path) -> Options {
    Options { socket: directory.join("dataplane.sock"), take_over: true, instance: None }
}

fn acquire_alone(options: &Options) -> Plane {
    acquire(options, &mut None).unwrap()
}

/// The socket of a killed data process accepts connections until the kernel has closed it.
#[test]
fn takeover_from_dying_process_starts_fresh() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path());
    drop(acquire_alone(&options));
    std::fs::remove_file(&options.socket).unwrap();
    let lock = FileLock::try_acquire(&lock_path(&options.socket)).unwrap().unwrap();
    let listener = UnixListener::bind(&options.socket).unwrap();
    let dying = std::thread::spawn(move || {
        // Three connections: closed with an unread request, closed after the request was read,
        // never accepted.
        drop(listener.accept().unwrap());
        let (stream, _) = listener.accept().unwrap();
        let asked: Request = read_frame(&mut &stream).unwrap().unwrap();
        assert!(matches!(asked, Request::TakeOver { version: HANDOVER_VERSION }), "{asked:?}");
        drop(stream);
        std::thread::sleep(3 * LOCK_INTERVAL);
        drop(listener);
        drop(lock);
    });
    assert!(acquire_alone(&options).stored.is_none());
    dying.join().unwrap();
}

/// A data process of a release with another hand-over must exit before the new one starts.
#[test]
fn takeover_with_other_version_stops_old_process() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path());
    let lock = FileLock::try_acquire(&lock_path(&options.socket)).unwrap().unwrap();
    let listener = UnixListener::bind(&options.socket).unwrap();
    let other = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let asked: Request = read_frame(&mut &stream).unwrap().unwrap();
        assert!(matches!(asked, Request::TakeOver { .. }), "{asked:?}");
        let message = "version 7 is wanted".to_owned();
        let answer = Response::Error { kind: ErrorKind::Invalid, message };
        write_frame(&mut &stream, &answer).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let asked: Request = read_frame(&mut &stream).unwrap().unwrap();
        assert!(matches!(asked, Request::Shutdown), "{asked:?}");
        std::thread::sleep(LOCK_INTERVAL);
        drop(lock);
        Instant::now()
    });
    assert!(acquire_alone(&options).stored.is_none());
    let taken = Instant::now();
    assert!(
        other.join().unwrap() <= taken,
        "The old process must stop before the plane is acquired."
    );
}

/// A release without locks leaves the lock free while it listens.
#[test]
fn data_process_without_lock_is_stopped() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path());
    let listener = UnixListener::bind(&options.socket).unwrap();
    let other = std::thread::spawn(move || {
        loop {
            let (stream, _) = listener.accept().unwrap();
            let asked: Request = read_frame(&mut &stream).unwrap().unwrap();
            if matches!(asked, Request::Shutdown) {
                return;
            }
            let message = "version 1 is wanted".to_owned();
            let answer = Response::Error { kind: ErrorKind::Invalid, message };
            write_frame(&mut &stream, &answer).unwrap();
        }
    });
    assert!(acquire_alone(&options).stored.is_none());
    other.join().unwrap();
}

fn stored() -> StoredFds {
    let state = HandOver {
        version: HANDOVER_VERSION,
        lanes: 1,
        families: Vec::new(),
        offload: TunOffload::NONE,
        gso: true,
        capabilities: Vec::new(),
        generation: 7,
    };
    let files = (0..state.descriptor_count()).map(|_| tempfile::tempfile().unwrap().into());
    StoredFds { descriptors: files.collect(), state }
}

/// A keeper dies between its hand-over and its confirmation; the next keeper gets all
/// descriptors.
#[test]
fn keeper_that_exits_in_hand_over_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path());
    let mut plane = acquire_alone(&options);
    let socket = options.socket.clone();
    let dying = std::thread::spawn(move || {
        let (connection, _) = plane.listener.accept().unwrap();
        let asked: Request = read_frame(&mut &connection).unwrap().unwrap();
        assert!(matches!(asked, Request::TakeOver { .. }), "{asked:?}");
        plane.stored = Some(stored());
        plane.save();
        assert!(plane.hand_over(&connection));
    });
    let taken = acquire_alone(&options);
    assert_eq!(taken.stored.unwrap().state.generation, 7);
    assert_eq!(taken.listener.local_addr().unwrap().as_pathname(), Some(&*socket));
    dying.join().unwrap();
}

/// The data process dies before it accepts the connection, which the store keeps open.
#[test]
fn lock_that_becomes_free_during_a_request_is_acquired() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path());
    let mut plane = acquire_alone(&options);
    plane.stored = Some(stored());
    plane.save();
    let copies = plane.store.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
    let mut held = FdStore::received(copies.into());
    let requesting = std::thread::spawn(move || {
        let mut attempt = LockAttempts::new(&options);
        request(&options.socket, &mut held, &mut attempt).is_ok()
    });
    std::thread::sleep(10 * LOCK_INTERVAL);
    assert!(!requesting.is_finished(), "The other keeper has the data plane.");
    drop(plane);
    assert!(requesting.join().unwrap(), "The request must return the lock.");
}

/// A keeper that has handed over its data plane gets it back when the other keeper ends.
#[test]
fn holder_takes_back_plane_of_exited_keeper() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path());
    let mut plane = acquire_alone(&options);
    let copies = plane.store.descriptors().map(|fd| fd.try_clone_to_owned().unwrap());
    let mut held = FdStore::received(copies.into());
    let waiting = std::thread::spawn(move || acquire(&options, &mut held).unwrap());
    std::thread::sleep(10 * LOCK_INTERVAL);
    assert!(!waiting.is_finished(), "The other keeper has the data plane.");
    plane.stored = Some(stored());
    plane.save();
    drop(plane);
    assert_eq!(waiting.join().unwrap().stored.unwrap().state.generation, 7);
}
