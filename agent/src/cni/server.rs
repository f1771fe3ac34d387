//! Server of the plugin's socket. A connection carries one request, from root only. The numbers of
//! connections and of active requests are bounded, and each request has a timeout.

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

/// Maximum number of requests that are processed at the same time. More requests would only wait
/// for the kernel's lock of the network configuration (RTNL).
const MAX_ACTIVE_REQUESTS: usize = 32;
/// Maximum number of open connections; further ones wait in the socket's backlog.
const MAX_CONNECTIONS: usize = 512;
/// Timeout of reading the request, and of writing the answer.
const IO_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout of a request, including the wait for its turn. It is shorter than the plugin's timeout
/// of an ADD (30 s); the plugin spools a DEL that times out. The runtime's next ADD completes an
/// interrupted attachment, and its DEL undoes it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(25);

/// Processor of the plugin's requests.
pub(super) trait Handler: Send + Sync + 'static {
    /// Processes a request and returns its answer. `netns` is the descriptor that came with the
    /// request. The server drops the future at the timeout.
    fn answer(
        &self,
        request: Request,
        netns: Option<OwnedFd>,
    ) -> impl Future<Output = Response> + Send;

    /// Records the outcome and the duration of a request.
    fn on_answered(&self, verb: &'static str, outcome: Outcome, took: Duration);
}

/// Serves requests until the task is aborted.
pub(super) async fn serve<H: Handler>(mut listener: Listener, handler: Arc<H>) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let turns = Arc::new(Semaphore::new(MAX_ACTIVE_REQUESTS));
    loop {
        // Neither semaphore is ever closed.
        let Ok(connection) = Arc::clone(&connections).acquire_owned().await else { return };
        let stream = listener.accept().await;
        let (handler, turns) = (Arc::clone(&handler), Arc::clone(&turns));
        tokio::spawn(async move {
            if let Err(error) = serve_connection(&stream, &*handler, &turns).await {
                tracing::debug!(%error, "request of the CNI plugin not answered");
            }
            drop(connection);
        });
    }
}

async fn serve_connection<H: Handler>(
    stream: &UnixStream,
    handler: &H,
    turns: &Semaphore,
) -> io::Result<()> {
    if stream.peer_cred()?.uid() != 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let request = tokio::time::timeout(IO_TIMEOUT, wire::receive::<Request>(stream));
    let answer = match request.await? {
        Ok((request, _)) if request.protocol != VERSION => refusal(
            ErrorCode::IncompatibleVersion as u32,
            format!(
                "the plugin speaks protocol {}, the agent protocol {VERSION}. Install the plugin of \
                 this agent's release.",
                request.protocol
            ),
        ),
        Ok((request, netns)) => {
            let (verb, began) = (verb(&request.command), Instant::now());
            let work = async {
                let _turn = turns.acquire().await;
                handler.answer(request, netns).await
            };
            let answer = tokio::time::timeout(REQUEST_TIMEOUT, work).await;
            let outcome = answer.as_ref().map_or(Outcome::Late, Outcome::of);
            handler.on_answered(verb, outcome, began.elapsed());
            answer.unwrap_or_else(|_| {
                tracing::warn!(verb, timeout = ?REQUEST_TIMEOUT, "request of the CNI plugin timed out");
                let late = format!(
                    "the agent did not finish the request within {REQUEST_TIMEOUT:?}. Its log has the \
                     cause."
                );
                refusal(ErrorCode::TryAgainLater as u32, late)
            })
        }
        Err(FrameError::Io(error)) => return Err(error),
        Err(error) => refusal(ErrorCode::Decoding as u32, error.to_string()),
    };
    tokio::time::timeout(IO_TIMEOUT, wire::reply(stream, &answer)).await?
}

/// Returns an error answer without details.
pub(super) fn refusal(code: u32, msg: impl Into<String>) -> Response {
    Response::Refused(CniError { code, msg: msg.into(), details: String::new() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use skein_cni_protocol::{Command, frame};

    /// Handler that notifies of the request and never answers; it stores the outcomes.
    #[derive(Default)]
    struct PendingHandler(
        tokio::sync::Notify,
        std::sync::Mutex<Vec<(&'static str, Outcome, Duration)>>,
    );

    impl Handler for PendingHandler {
        async fn answer(&self, _request: Request, _netns: Option<OwnedFd>) -> Response {
            self.0.notify_one();
            std::future::pending().await
        }

        fn on_answered(&self, verb: &'static str, outcome: Outcome, took: Duration) {
            self.1.lock().unwrap().push((verb, outcome, took));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn request_beyond_timeout_is_refused_and_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cni.sock");
        let listener = Listener::bind("cni.socket", &path, None).unwrap();
        let handler = Arc::new(PendingHandler::default());
        let server = tokio::spawn(serve(listener, Arc::clone(&handler)));
        let request = Request { protocol: VERSION, command: Command::Status };
        let ask = move || {
            let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
            std::io::Write::write_all(&mut stream, &frame::encode(&request).unwrap()).unwrap();
            frame::read::<Response>(&mut stream)
        };
        let asked = tokio::task::spawn_blocking(ask);
        handler.0.notified().await;
        tokio::time::advance(REQUEST_TIMEOUT).await;
        let answer = asked.await.unwrap().unwrap();
        assert!(
            matches!(&answer, Response::Refused(refusal) if refusal.code == 11 && refusal.msg.contains("25s")),
            "{answer:?}"
        );
        assert_eq!(*handler.1.lock().unwrap(), [("status", Outcome::Late, REQUEST_TIMEOUT)]);
        server.abort();
    }
}
