//! Tests of the control socket.

use skein_ipc::keys::PublicKey;
use skein_sys::descriptors;
use skein_sys::lock::FileLock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::control::agent_client::{self, AgentError};
use crate::control::exports::tests::status_source;

/// A served control socket and the receivers of its requests.
struct Agent {
    directory: tempfile::TempDir,
    hand_over: mpsc::Receiver<std_net::UnixStream>,
    rotate: mpsc::Receiver<RotationRequest>,
}

impl Agent {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = bind(&directory.path().join("control.sock")).unwrap();
        let ((to_hand_over, hand_over), (to_rotate, rotate)) = (mpsc::channel(1), mpsc::channel(1));
        let log_levels = LogLevels { dataplane: directory.path().join("dataplane.sock") };
        let senders = RequestSenders { hand_over: to_hand_over, rotate: to_rotate, log_levels };
        let status = status_source("name = 'node-a'");
        tokio::spawn(serve(listener, status, senders));
        Self { directory, hand_over, rotate }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.directory.path().join("control.sock")
    }

    /// Sends bytes, shuts the own side down, and returns the whole answer.
    async fn answer(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(self.socket()).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Returns the status code and the error of the answer to a request.
    async fn error(&self, method: &str, resource: &str, body: &str) -> (u16, String) {
        let length = body.len();
        let header = format!(
            "{method} {resource} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n"
        );
        let answer = self.answer(&(header + body)).await;
        let (header, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(header.contains("application/json"), "{header}");
        let code = header.split(' ').nth(1).unwrap().parse().unwrap();
        (code, serde_json::from_str::<ErrorBody>(body).unwrap().error)
    }
}

/// Answers the next request for another key.
fn answer_rotation(
    mut requests: mpsc::Receiver<RotationRequest>,
    answer: impl FnOnce(bool) -> Result<RotationStatus, RotationError> + Send + 'static,
) {
    tokio::spawn(async move {
        let RotationRequest { at_once, answer: to } = requests.recv().await.unwrap();
        to.send(answer(at_once)).unwrap();
    });
}

#[tokio::test]
async fn client_that_has_shut_down_its_side_is_answered() {
    let mut agent = Agent::start();
    let (_, unused) = mpsc::channel(1);
    let mut requests = std::mem::replace(&mut agent.rotate, unused);
    tokio::spawn(async move {
        let RotationRequest { answer, .. } = requests.recv().await.unwrap();
        // Time in which the server sees the end of the client's data.
        tokio::time::sleep(Duration::from_millis(50)).await;
        answer.send(Ok(RotationStatus::of(PublicKey([1; 32])))).unwrap();
    });
    let request = "POST /key/rotation HTTP/1.1\r\nHost: x\r\n\
                   Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    let answer = agent.answer(request).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "the answer is {answer:?}");
}

#[tokio::test]
async fn status_is_a_resource() {
    let agent = Agent::start();
    let status: Document = agent_client::status(&agent.socket()).await.unwrap();
    assert_eq!(status.node, "node-a");
}

#[tokio::test]
async fn key_rotation_returns_state_or_conflict() {
    let agent = Agent::start();
    let socket = agent.socket();
    let status = RotationStatus::of(PublicKey([7; 32]));
    let expected = status.clone();
    answer_rotation(agent.rotate, move |at_once| {
        assert!(at_once, "The body must reach the agent.");
        Ok(status)
    });
    assert_eq!(agent_client::rotate_key(&socket, true).await.unwrap(), expected);

    let agent = Agent::start();
    let socket = agent.socket();
    answer_rotation(agent.rotate, |_| Err(Failure::InUse("it changes".to_owned()).into()));
    let error = agent_client::rotate_key(&socket, false).await.unwrap_err();
    assert!(
        matches!(&error, AgentError::Refused { status: StatusCode::CONFLICT, message } if message == "it changes"),
        "{error:?}"
    );
}

#[tokio::test]
async fn agent_that_ends_answers_unavailable() {
    let mut agent = Agent::start();
    agent.rotate.close();
    let (code, error) = agent.error("POST", "/key/rotation", "{}").await;
    assert_eq!((code, error.as_str()), (503, "the agent is ending"));
}

#[tokio::test]
async fn errors_have_a_status_code_and_a_json_body() {
    let agent = Agent::start();
    for (method, resource, body, expected) in [
        ("GET", "/nothing", "", 404),
        ("GET", "/key/rotation", "", 405),
        ("DELETE", "/status", "", 405),
        ("GET", "/policy", "", 409),
        ("GET", "/policy/pod", "", 400),
        ("GET", "/policy/pod?name=a", "", 409),
        ("POST", "/key/rotation", "{", 400),
        ("POST", "/key/rotation", "{\"now\":true}", 422),
        ("PUT", "/log/level", "{}{}", 400),
        ("PUT", "/log/level", "{\"level\":\"inof\"}", 422),
        ("POST", "/hand-over", "", 426),
    ] {
        let (code, error) = agent.error(method, resource, body).await;
        assert_eq!(code, expected, "{method} {resource} {body}: {error}");
        assert!(!error.is_empty(), "{method} {resource} must name the failure.");
    }
    let long = format!("{{\"level\":\"{}\"}}", "x".repeat(MAX_BODY));
    assert_eq!(agent.error("PUT", "/log/level", &long).await.0, 413);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hand_over_passes_the_lock_to_one_agent() {
    let mut agent = Agent::start();
    let lock_path = agent.directory.path().join("lock");
    let socket = agent.socket();
    let request = {
        let socket = socket.clone();
        tokio::task::spawn_blocking(move || agent_client::request_hand_over(&socket))
    };
    let connection = agent.hand_over.recv().await.unwrap();
    let lock = FileLock::try_acquire(&lock_path).unwrap().unwrap();
    let lock = std::os::fd::OwnedFd::from(lock);
    descriptors::send(&connection, &[std::os::fd::AsFd::as_fd(&lock)]).unwrap();
    drop(lock);
    let received = request.await.unwrap().unwrap();
    assert!(received.is_some(), "The lock must arrive.");
    assert!(FileLock::try_acquire(&lock_path).unwrap().is_none(), "The lock must stay taken.");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn second_hand_over_is_refused() {
    let agent = Agent::start();
    let ask = || {
        let socket = agent.socket();
        tokio::task::spawn_blocking(move || agent_client::request_hand_over(&socket))
    };
    let first = ask();
    while agent.hand_over.is_empty() {
        tokio::task::yield_now().await;
    }
    let error = ask().await.unwrap().unwrap_err();
    assert!(error.to_string().contains("already"), "{error}");
    drop(agent.hand_over);
    assert!(first.await.unwrap().unwrap().is_none(), "The agent ended without a hand-over.");
}

#[tokio::test]
async fn line_requests_of_0_1_0_are_answered() {
    let agent = Agent::start();
    let status: Document = serde_json::from_str(&agent.answer("").await).unwrap();
    assert_eq!(status.node, "node-a");
    let level: Result<(), String> =
        serde_json::from_str(&agent.answer("log level inof\n").await).unwrap();
    assert!(level.is_err());
    assert_eq!(agent.answer("something else\n").await, "");

    let mut successor = std_net::UnixStream::connect(agent.socket()).unwrap();
    io::Write::write_all(&mut successor, b"hand over\n").unwrap();
    let mut hand_over = agent.hand_over;
    assert!(hand_over.recv().await.is_some(), "The connection must be passed on.");

    let agent = Agent::start();
    let socket = agent.socket();
    answer_rotation(agent.rotate, |at_once| {
        assert!(at_once);
        Err(RotationError::Starting)
    });
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(b"rotate key at once\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, r#"{"Err":"the agent is still starting"}"#);
}
