//! Tasks of an agent for its instance: answers to probes, and the request for the data plane.

use std::io;
use std::time::Duration;

use skein_dataplane::activation::Activity;
use skein_ipc::instance::{Instance, READY};
use skein_sys::socket::check_listener;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::failure::Failure;
use crate::lifecycle::Readiness;
use crate::listener::bind_socket;

/// Delay before the next connection attempt to an absent keeper.
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// Timeout of a start for the instance's data plane.
const ACTIVATION_TIMEOUT: Duration = Duration::from_secs(3);

/// Answers the instance's probes with the state in `readiness` until the task is dropped.
///
/// # Errors
/// [`Failure`] if the socket cannot be bound, or if another agent of this instance listens on it.
pub fn answer_probes(instance: &Instance, readiness: Readiness) -> Result<JoinSet<()>, Failure> {
    let failed = |error| Failure::io("cannot use the directory of --instance", error);
    instance.protect_directory().map_err(failed)?;
    let listener = bind_socket("the socket of --instance", &instance.agent_socket())?;
    let mut task = JoinSet::new();
    task.spawn(answer(listener, readiness));
    Ok(task)
}

async fn answer(listener: UnixListener, readiness: Readiness) {
    loop {
        let answered: io::Result<()> = async {
            let (mut stream, _) = listener.accept().await?;
            let reasons = readiness.reasons();
            let text = if reasons.is_empty() { READY.into() } else { reasons.join("\n") + "\n" };
            // The answer of a few hundred bytes fits into the socket's buffer.
            stream.write_all(text.as_bytes()).await?;
            stream.shutdown().await
        }
        .await;
        if let Err(error) = answered {
            tracing::debug!(%error, "probe not answered");
            tokio::time::sleep(RETRY_DELAY).await;
        }
    }
}

/// A request for the data plane, in effect until the value is dropped. The agent is not ready while
/// another instance has the data plane, because that instance may end at any time.
#[derive(Debug)]
pub struct DataplaneRequest {
    active: watch::Receiver<bool>,
    _task: JoinSet<()>,
}

impl DataplaneRequest {
    /// Requests the data plane for the instance.
    pub fn start(instance: &Instance, readiness: Readiness) -> Self {
        let (sender, active) = watch::channel(false);
        let mut task = JoinSet::new();
        task.spawn(request(instance.clone(), readiness, sender));
        Self { active, _task: task }
    }

    /// Waits until the instance has the data plane, at most [`ACTIVATION_TIMEOUT`].
    pub async fn granted(&mut self) {
        let granted = self.active.wait_for(|active| *active);
        if tokio::time::timeout(ACTIVATION_TIMEOUT, granted).await.is_err() {
            tracing::warn!("data plane of this instance not active yet");
        }
    }
}

async fn request(instance: Instance, readiness: Readiness, active: watch::Sender<bool>) {
    const REASON: &str = "the data plane of this agent's instance is not active";
    let mut blocked = Some(readiness.block(REASON));
    loop {
        let asked: io::Result<()> = async {
            let mut stream = UnixStream::connect(instance.dataplane_socket()).await?;
            check_listener(stream.peer_cred()?.uid())?;
            stream.write_u8(1).await?;
            loop {
                let is_active = stream.read_u8().await? == Activity::Active as u8;
                match is_active {
                    true => blocked = None,
                    false => {
                        blocked.get_or_insert_with(|| readiness.block(REASON));
                    }
                }
                active.send_replace(is_active);
            }
        }
        .await;
        if let Err(error) = asked {
            tracing::debug!(%error, "keeper of this instance not reachable");
        }
        active.send_replace(false);
        blocked.get_or_insert_with(|| readiness.block(REASON));
        tokio::time::sleep(RETRY_DELAY).await;
    }
}
