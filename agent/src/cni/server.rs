//! The socket that the plugin asks on: one request a connection, from root only, a bounded number at
//! once, each with a deadline.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use skein_cni_protocol::frame::FrameError;
use skein_cni_protocol::types::ErrorCode;
use skein_cni_protocol::{CniError, Request, Response, VERSION};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::metrics::{Outcome, verb};
use super::wire;
use crate::listener::Listener;

/// Requests that are worked on at once; others wait for their turn. More would only wait for the kernel's
/// one lock of the network configuration.
const AT_ONCE: usize = 32;
/// Connections that are open at once; more wait in the socket's backlog.
const CONNECTIONS: usize = 512;
/// How long the plugin may take to say what it wants, or to read the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a request may be worked on, its turn included: less than the plugin waits for an ADD
/// (30 s); a DEL that it has given up on it keeps for later. What was begun is finished by the runtime's next ADD, or taken back by its DEL.
const WORK: Duration = Duration::from_secs(25);

/// Whoever does what is asked.
pub(super) trait Handler: Send + Sync + 'static {
    /// Answers one request.
    fn answer(
        &self,
        request: Request,
        netns: Option<OwnedFd>,
    ) -> impl Future<Output = Response> + Send;

    /// Is told how a request of that verb went.
    fn note(&self, verb: &'static str, outcome: Outcome, took: Duration);
}

/// Serves until it is aborted.
pub(super) async fn serve<H: Handler>(mut listener: Listener, handler: Arc<H>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        // Neither semaphore is ever closed.
        let Ok(connection) = Arc::clone(&connections).acquire_owned().await else { return };
        match listener.accept().await {
            Ok(stream) => {
                let (handler, turns) = (Arc::clone(&handler), Arc::clone(&turns));
                tokio::spawn(async move {
                    if let Err(error) = talk(&stream, &*handler, &turns).await {
                        tracing::debug!(%error, "a request of the CNI plugin got no answer");
                    }
                    drop(connection);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept on cni.socket");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn talk<H: Handler>(stream: &UnixStream, handler: &H, turns: &Semaphore) -> io::Result<()> {
    if stream.peer_cred()?.uid() != 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let request = tokio::time::timeout(PATIENCE, wire::receive::<Request>(stream));
    let answer = match request.await? {
        Ok((request, _)) if request.protocol != VERSION => refusal(
            ErrorCode::IncompatibleVersion as u32,
            format!(
                "the plugin speaks protocol {} and the agent {VERSION}: install the plugin of this agent",
                request.protocol
            ),
        ),
        Ok((request, netns)) => {
            let (verb, began) = (verb(&request.command), Instant::now());
            let work = async {
                let _turn = turns.acquire().await;
                handler.answer(request, netns).await
            };
            let answer = tokio::time::timeout(WORK, work).await;
            let outcome = answer.as_ref().map_or(Outcome::Late, Outcome::of);
            handler.note(verb, outcome, began.elapsed());
            answer.unwrap_or_else(|_| {
                tracing::warn!(verb, "a request of the CNI plugin was not done within {WORK:?}");
                let late = format!("the agent was not done within {WORK:?}: see its log");
                refusal(ErrorCode::TryAgainLater as u32, late)
            })
        }
        Err(FrameError::Io(error)) => return Err(error),
        Err(error) => refusal(ErrorCode::Decoding as u32, error.to_string()),
    };
    tokio::time::timeout(PATIENCE, wire::reply(stream, &answer)).await?
}

/// An answer that says no.
pub(super) fn refusal(code: u32, msg: impl Into<String>) -> Response {
    Response::Refused(CniError { code, msg: msg.into(), details: String::new() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use skein_cni_protocol::{Command, frame};

    /// Says that it has begun, and never ends; what it was told.
    #[derive(Default)]
    struct Hangs(tokio::sync::Notify, std::sync::Mutex<Vec<(&'static str, Outcome, Duration)>>);

    impl Handler for Hangs {
        async fn answer(&self, _request: Request, _netns: Option<OwnedFd>) -> Response {
            self.0.notify_one();
            std::future::pending().await
        }

        fn note(&self, verb: &'static str, outcome: Outcome, took: Duration) {
            self.1.lock().unwrap().push((verb, outcome, took));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_too_long_is_refused_and_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        let listener = Listener::bind("cni.socket", &path, None).unwrap();
        let handler = Arc::new(Hangs::default());
        let server = tokio::spawn(serve(listener, Arc::clone(&handler)));
        let request = Request { protocol: VERSION, command: Command::Status };
        let ask = move || {
            let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
            std::io::Write::write_all(&mut stream, &frame::encode(&request).unwrap()).unwrap();
            frame::read::<Response>(&mut stream)
        };
        let asked = tokio::task::spawn_blocking(ask);
        handler.0.notified().await;
        tokio::time::advance(WORK).await;
        let answer = asked.await.unwrap().unwrap();
        assert!(
            matches!(&answer, Response::Refused(refusal) if refusal.code == 11 && refusal.msg.contains("25s")),
            "{answer:?}"
        );
        assert_eq!(*handler.1.lock().unwrap(), [("status", Outcome::Late, WORK)]);
        server.abort();
    }
}
