//! Tests of the supervisor with a fake data process: a thread that answers requests by a function.

#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use skein_ipc::keys::PublicKey;
use skein_ipc::{
    NodeIdentity, Peer, ReducedPath, Report, Response, SeenHandshakes, read_frame, write_frame,
};

use super::*;
use crate::control::rotation::NodeKeys;
use crate::logging::LogFormat;

/// A fake data process. It answers requests by a function of the request's number and content.
struct Fake {
    /// Received requests, as text.
    asked: Receiver<String>,
    _directory: tempfile::TempDir,
    socket: PathBuf,
}

type Answer = fn(usize, &Request) -> Option<Response>;

fn hello() -> Response {
    hello_that_accepts(false)
}

fn hello_that_accepts(accepts_seen_handshakes: bool) -> Response {
    let pid = std::process::id();
    Response::Hello {
        version: skein_ipc::PROTOCOL_VERSION,
        pid,
        node: None,
        accepts_seen_handshakes,
    }
}

/// Accepts every request.
fn willing(_: usize, request: &Request) -> Option<Response> {
    Some(match request {
        Request::Hello { .. } => hello(),
        Request::Apply { snapshot } => Response::Applied { revision: snapshot.revision },
        Request::Update { update } => Response::Applied { revision: update.revision },
        Request::Report { .. } => Response::Report { report: Box::default() },
        Request::SeenHandshakes => Response::SeenHandshakes { seen: seen_of_one() },
        _ => Response::Applied { revision: 0 },
    })
}

fn seen_of_one() -> SeenHandshakes {
    SeenHandshakes::from([(PublicKey([1; 32]), 42)])
}

impl Fake {
    fn start(answer: Answer) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let (requests, asked) = channel();
        thread::spawn(move || serve(&listener, &requests, answer));
        Self { asked, _directory: directory, socket }
    }

    fn next(&self) -> String {
        self.asked.recv_timeout(Duration::from_secs(30)).unwrap()
    }
}

/// Serves one connection after the other; the answer `None` closes the connection.
fn serve(listener: &UnixListener, requests: &Sender<String>, answer: Answer) {
    let mut count = 0;
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        while let Ok(Some(request)) = read_frame::<Request>(&mut stream) {
            let text = match &request {
                Request::Hello { .. } => "hello".to_owned(),
                Request::Apply { snapshot } if !snapshot.seen_handshakes.is_empty() => {
                    format!("apply {} seen {:?}", snapshot.peers.len(), snapshot.seen_handshakes)
                }
                Request::Apply { snapshot } => format!("apply {}", snapshot.peers.len()),
                Request::SeenHandshakes => "seen handshakes".to_owned(),
                Request::Update { update } => {
                    format!("update +{} -{}", update.upsert.len(), update.remove.len())
                }
                Request::Report { .. } => "report".to_owned(),
                Request::LogLevel { .. } => "log level".to_owned(),
                Request::Shutdown => "shutdown".to_owned(),
                Request::TakeOver { .. } => "take over".to_owned(),
                Request::Capture { .. } => "watch".to_owned(),
                Request::Changes { .. } => "changes".to_owned(),
            };
            // Heartbeats come at any time.
            if text != "report" && requests.send(text).is_err() {
                return;
            }
            let Some(response) = answer(count, &request) else { break };
            count += usize::from(!matches!(request, Request::Report { .. }));
            write_frame(&mut stream, &response).unwrap();
            stream.flush().unwrap();
        }
    }
}

fn snapshot(peers: u8) -> Arc<Snapshot> {
    let config = Config::parse("name = 'node-a'\n[underlay]\naddresses = ['192.0.2.1']").unwrap();
    let peer = |n: u8| Peer {
        name: format!("node-{n}"),
        public_key: PublicKey([n; 32]),
        second_public_key: None,
        endpoints: vec![],
        pod_cidrs: vec![],
    };
    let desired = super::super::desired::Desired {
        mtu_problem: None,
        mtu: 1440,
        local_cidrs: vec![],
        peers: (1..=peers).map(peer).collect(),
        addresses: vec![],
        peer_addresses: Vec::new(),
        overlay: Default::default(),
        unreachable: Default::default(),
        unresolved: vec![],
    };
    let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=".parse().unwrap();
    let keys = NodeKeys { current: &key, second: None };
    Arc::new(desired.snapshot(&config, keys, 7, u64::from(peers)))
}

struct Lab {
    handle: Handle,
    first: oneshot::Receiver<Result<(), Failure>>,
    wanted: watch::Sender<Arc<Snapshot>>,
    state: DataplaneState,
    readiness: Readiness,
}

fn supervise(fake: &Fake) -> Lab {
    supervise_in(fake, Mode::External)
}

fn supervise_in(fake: &Fake, mode: Mode) -> Lab {
    let (wanted, snapshots) = watch::channel(snapshot(1));
    let (state, readiness) = (DataplaneState::default(), Readiness::default());
    let log = Log { level: "info".to_owned(), format: LogFormat::Text };
    let clock = fake.socket.with_file_name("clock");
    let handshakes = fake.socket.with_file_name("handshakes.json");
    let socket = fake.socket.clone();
    let settings = Settings {
        socket,
        mode,
        log,
        clock,
        handshakes,
        seccomp: true,
        require_confinement: false,
    };
    let Supervision { handle, first } =
        start(settings, snapshots, state.clone(), readiness.clone());
    Lab { handle, first, wanted, state, readiness }
}

async fn settle(mut condition: impl FnMut() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("the condition was not met within 5 s");
}

#[tokio::test]
async fn data_process_follows_the_desired_state() {
    let fake = Fake::start(willing);
    let lab = supervise(&fake);
    assert!(!lab.readiness.reasons().is_empty());
    lab.first.await.unwrap().unwrap();
    assert_eq!([fake.next(), fake.next()], ["hello", "apply 1"]);
    assert!(lab.readiness.reasons().is_empty());
    lab.wanted.send_replace(snapshot(3));
    settle(|| lab.state.status().revision == 3).await;
    assert_eq!(fake.next(), "update +2 -0");
    lab.wanted.send_replace(snapshot(2));
    settle(|| lab.state.status().revision == 2).await;
    assert_eq!(fake.next(), "update +0 -1");
    lab.handle.end(ShutdownMode::Stop).await;
    assert!(
        fake.asked.try_recv().is_err(),
        "the supervisor must not stop an external data process"
    );
}

#[tokio::test]
async fn refused_update_is_followed_by_whole_snapshot() {
    let fake = Fake::start(|count, request| match request {
        Request::Update { .. } => Some(Response::Error {
            kind: ErrorKind::Invalid,
            message: "an update came before any snapshot".to_owned(),
        }),
        _ => willing(count, request),
    });
    let lab = supervise(&fake);
    lab.first.await.unwrap().unwrap();
    lab.wanted.send_replace(snapshot(3));
    settle(|| lab.state.status().revision == 3).await;
    let asked: Vec<_> = (0..4).map(|_| fake.next()).collect();
    assert_eq!(asked, ["hello", "apply 1", "update +2 -0", "apply 3"]);
    lab.handle.end(ShutdownMode::Keep).await;
}

#[tokio::test]
async fn refusal_of_first_snapshot_is_final() {
    for (answer, code) in [
        ((|_, r| refuse(r, ErrorKind::InUse)) as Answer, 5),
        (|_, r| refuse(r, ErrorKind::Missing), 4),
        (|_, r| refuse(r, ErrorKind::Privilege), 3),
        (|_, r| refuse(r, ErrorKind::Internal), 1),
    ] {
        let fake = Fake::start(answer);
        let lab = supervise(&fake);
        let failure = lab.first.await.unwrap().unwrap_err();
        let found = match failure {
            Failure::InUse(_) => 5,
            Failure::Missing(_) => 4,
            Failure::Privilege(_) => 3,
            Failure::Usage(_) => 2,
            Failure::Runtime(_) => 1,
        };
        assert_eq!(found, code);
        assert!(lab.readiness.reasons()[0].contains("no luck"));
        lab.handle.end(ShutdownMode::StopOwn).await;
    }
}

fn hello_of(name: &str, key: u8) -> Response {
    let node = NodeIdentity { name: name.to_owned(), public_key: PublicKey([key; 32]) };
    Response::Hello {
        version: skein_ipc::PROTOCOL_VERSION,
        pid: std::process::id(),
        node: Some(node),
        accepts_seen_handshakes: false,
    }
}

#[tokio::test]
async fn data_process_of_another_node_keeps_running() {
    for mode in [Mode::External, Mode::Spawn] {
        let fake = Fake::start(|count, request| match request {
            Request::Hello { .. } => Some(hello_of("node-b", 9)),
            _ => willing(count, request),
        });
        let lab = supervise_in(&fake, mode);
        let failure = lab.first.await.unwrap().unwrap_err();
        assert!(
            matches!(&failure, Failure::InUse(text) if text.contains("\"node-b\"")),
            "{failure}"
        );
        lab.handle.end(ShutdownMode::Stop).await;
        assert!(!fake.asked.try_iter().any(|asked| asked != "hello"));
    }
}

#[tokio::test]
async fn data_process_with_earlier_key_is_adopted() {
    let fake = Fake::start(|count, request| match request {
        Request::Hello { .. } => Some(hello_of("node-a", 9)),
        _ => willing(count, request),
    });
    let lab = supervise(&fake);
    lab.first.await.unwrap().unwrap();
    lab.handle.end(ShutdownMode::Keep).await;
}

#[tokio::test]
async fn external_data_process_is_never_stopped() {
    let fake = Fake::start(|_, request| refuse(request, ErrorKind::Invalid));
    let lab = supervise(&fake);
    assert!(matches!(lab.first.await.unwrap(), Err(Failure::Usage(_))));
    lab.handle.end(ShutdownMode::Stop).await;
    assert!(!fake.asked.try_iter().any(|asked| asked == "shutdown"));
}

fn refuse(request: &Request, kind: ErrorKind) -> Option<Response> {
    match request {
        Request::Hello { .. } => Some(hello()),
        _ => Some(Response::Error { kind, message: "no luck".to_owned() }),
    }
}

#[tokio::test]
async fn closed_connection_is_replaced_by_a_new_session() {
    // The third request, an update, is answered by closing the connection.
    let fake = Fake::start(|count, request| match count {
        2 if matches!(request, Request::Update { .. }) => None,
        _ => willing(count, request),
    });
    let lab = supervise(&fake);
    lab.first.await.unwrap().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    lab.wanted.send_replace(snapshot(3));
    settle(|| {
        seen.lock().unwrap().extend(lab.readiness.reasons());
        lab.state.status().revision == 3
    })
    .await;
    let asked: Vec<_> = (0..5).map(|_| fake.next()).collect();
    assert_eq!(asked, ["hello", "apply 1", "update +2 -0", "hello", "apply 3"]);
    assert!(lab.readiness.reasons().is_empty());
    assert_eq!(lab.state.status().restarts, 0, "the same process is no restart");
    lab.handle.end(ShutdownMode::Keep).await;
}

#[tokio::test]
async fn later_refusal_makes_the_agent_unready() {
    let fake = Fake::start(|count, request| match request {
        Request::Update { .. } => refuse(request, ErrorKind::Invalid),
        Request::Apply { snapshot } if snapshot.peers.len() == 2 => {
            refuse(request, ErrorKind::Missing)
        }
        _ => willing(count, request),
    });
    let lab = supervise(&fake);
    lab.first.await.unwrap().unwrap();
    lab.wanted.send_replace(snapshot(2));
    settle(|| lab.readiness.reasons().iter().any(|reason| reason.contains("no luck"))).await;
    lab.wanted.send_replace(snapshot(3));
    settle(|| lab.readiness.reasons().is_empty()).await;
    assert_eq!(lab.state.status().revision, 3);
    lab.handle.end(ShutdownMode::Keep).await;
}

#[tokio::test]
async fn handshake_times_pass_to_next_data_process() {
    let takes: Answer = |count, request| match request {
        Request::Hello { .. } => Some(hello_that_accepts(true)),
        _ => willing(count, request),
    };
    let fake = Fake::start(takes);
    let lab = supervise(&fake);
    lab.first.await.unwrap().unwrap();
    let file = fake.socket.with_file_name("handshakes.json");
    settle(|| file.exists()).await;
    let asked: Vec<_> = (0..3).map(|_| fake.next()).collect();
    assert_eq!(asked, ["hello", "apply 1", "seen handshakes"]);
    lab.handle.end(ShutdownMode::Keep).await;
    // A second agent and a second data process, with the same state directory.
    let lab = supervise(&fake);
    lab.first.await.unwrap().unwrap();
    let asked = [fake.next(), fake.next()];
    assert_eq!(asked, ["hello".to_owned(), format!("apply 1 seen {:?}", seen_of_one())]);
    lab.handle.end(ShutdownMode::Keep).await;
    // A data process of a release that refuses unknown fields.
    let older = Fake::start(willing);
    std::fs::copy(&file, older.socket.with_file_name("handshakes.json")).unwrap();
    let lab = supervise(&older);
    lab.first.await.unwrap().unwrap();
    assert_eq!([older.next(), older.next()], ["hello", "apply 1"]);
    lab.handle.end(ShutdownMode::Keep).await;
}

#[tokio::test(start_paused = true)]
async fn path_changes_of_one_second_are_reported_together() {
    let state = DataplaneState::default();
    let path = |mtu| ReducedPath { public_key: PublicKey([7; 32]), mtu };
    let report = |mtu| Report { reduced_paths: vec![path(mtu)], ..Report::default() };
    state.set(|status| status.up = true);
    let start = Instant::now();
    state.on_report(report(1300));
    let first = state.changed_paths(&[], start).await;
    assert_eq!((first.as_slice(), start.elapsed()), (&[path(1300)][..], Duration::ZERO));
    let hostile = async {
        for mtu in 600..1000 {
            state.on_report(report(mtu));
            sleep(Duration::from_millis(1)).await;
        }
    };
    let (next, ()) =
        tokio::join!(state.changed_paths(&first, start + Duration::from_secs(1)), hostile);
    assert_eq!((next.as_slice(), start.elapsed()), (&[path(999)][..], Duration::from_secs(1)));
}
