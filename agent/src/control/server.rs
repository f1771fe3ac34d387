//! Server of the control socket: HTTP over a unix socket, for the commands of this node and for an
//! agent that takes over.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /status` | | 200, [`Document`] |
//! | `GET /policy` | | 200, list of [`PolicySummary`] |
//! | `GET /policy/pod?name=POD` | | 200, list of [`PodReport`] |
//! | `POST /key/rotation` | [`KeyRotationBody`] | 200, [`RotationStatus`] |
//! | `PUT /log/level` | [`LogLevelBody`] | 204 |
//! | `POST /hand-over` with `Upgrade: skein-hand-over` | | 101, then the descriptor of the lock |
//!
//! An error is a status code and an [`ErrorBody`]. Only root and the agent's own user are served.

mod lines;

use std::io;
use std::os::unix::net as std_net;
use std::path::Path;
use std::time::Duration;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use skein_sys::socket::is_trusted;
use tokio::net::UnixStream;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

pub(super) use self::lines::HAND_OVER as HAND_OVER_LINE;
use super::exports::StatusSource;
use super::log_level::{LogLevelError, LogLevels};
use super::rotation::{RotationError, RotationRequest, RotationSender};
use crate::config::PolicyMode;
use crate::connection::serve_request;
use crate::failure::Failure;
use crate::listener::Listener;
use crate::policy::PolicyService;
use crate::policy::report::{PodReport, PolicySummary};
use crate::policy::source::ServiceEnded;
use crate::status::{Document, RotationStatus};

/// Timeout of a request and its answer.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum length of a request body, bytes.
const MAX_BODY: usize = 16 << 10;
/// Name of the protocol that follows `POST /hand-over`: one byte with one descriptor (SCM_RIGHTS),
/// the lock of the state directory, sent after the process has closed all other descriptors.
pub(super) const HAND_OVER_PROTOCOL: &str = "skein-hand-over";

/// Body of `POST /key/rotation`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct KeyRotationBody {
    /// True to invalidate the old key immediately.
    pub(super) at_once: bool,
}

/// Body of `PUT /log/level`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogLevelBody {
    /// Log level or filter; `None` (JSON `null`) restores the configured one.
    pub(super) level: Option<String>,
}

/// Body of an answer with an error status.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ErrorBody {
    /// The failure and its remedy, for users.
    pub(super) error: String,
}

/// An error answer: its status code and its text.
#[derive(Debug)]
struct ErrorAnswer(StatusCode, String);

impl IntoResponse for ErrorAnswer {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { error: self.1 })).into_response()
    }
}

impl From<JsonRejection> for ErrorAnswer {
    fn from(rejection: JsonRejection) -> Self {
        Self(rejection.status(), rejection.body_text())
    }
}

impl From<RotationError> for ErrorAnswer {
    fn from(error: RotationError) -> Self {
        let status = match &error {
            RotationError::Failed(Failure::Usage(_)) => StatusCode::UNPROCESSABLE_ENTITY,
            RotationError::Failed(Failure::InUse(_)) => StatusCode::CONFLICT,
            RotationError::Failed(_) => StatusCode::INTERNAL_SERVER_ERROR,
            RotationError::Starting | RotationError::NoRecords(_) | RotationError::Ending => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        };
        Self(status, error.to_string())
    }
}

impl From<ServiceEnded> for ErrorAnswer {
    fn from(error: ServiceEnded) -> Self {
        Self(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
    }
}

impl From<LogLevelError> for ErrorAnswer {
    fn from(error: LogLevelError) -> Self {
        let status = match &error {
            LogLevelError::Agent(_) => StatusCode::UNPROCESSABLE_ENTITY,
            LogLevelError::DataProcess(_) => StatusCode::BAD_GATEWAY,
        };
        Self(status, error.to_string())
    }
}

/// Binds the control socket ([`Listener::bind`]).
///
/// # Errors
/// [`Failure`] if the path cannot be bound, or if another process listens on it.
pub fn bind(path: &Path) -> Result<Listener, Failure> {
    Listener::bind("control.socket", path, None)
}

/// Senders of the requests that change the agent.
#[derive(Debug, Clone)]
pub struct RequestSenders {
    /// Sender of the connection of an agent that takes over.
    pub hand_over: mpsc::Sender<std_net::UnixStream>,
    /// Sender of requests for a key rotation.
    pub rotate: RotationSender,
    /// Setter of the log level.
    pub log_levels: LogLevels,
}

/// State of the handlers.
#[derive(Debug, Clone)]
struct Service {
    status: StatusSource,
    senders: RequestSenders,
}

/// Serves requests until the task is aborted.
pub async fn serve(mut listener: Listener, status: StatusSource, senders: RequestSenders) {
    let service = Service { status, senders };
    let router = router(service.clone());
    loop {
        let stream = listener.accept().await;
        let (service, router) = (service.clone(), router.clone());
        tokio::spawn(async move {
            let answered = answer(stream, service, router);
            match tokio::time::timeout(REQUEST_TIMEOUT, answered).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "control request failed"),
                Err(_) => tracing::debug!("control request timed out"),
            }
        });
    }
}

async fn answer(stream: UnixStream, service: Service, router: Router) -> io::Result<()> {
    if !is_trusted(stream.peer_cred()?.uid()) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    if lines::is_line_request(&stream).await? {
        return lines::answer(stream, &service).await;
    }
    serve_request(stream, router, REQUEST_TIMEOUT, REQUEST_TIMEOUT, true).await;
    Ok(())
}

fn router(service: Service) -> Router {
    let unknown = || async { ErrorAnswer(StatusCode::NOT_FOUND, "no such resource".to_owned()) };
    let not_allowed = || async {
        let text = "the resource does not have this method".to_owned();
        ErrorAnswer(StatusCode::METHOD_NOT_ALLOWED, text)
    };
    Router::new()
        .route("/status", get(status))
        .route("/policy", get(policies))
        .route("/policy/pod", get(policies_of_pod))
        .route("/key/rotation", post(rotate_key))
        .route("/log/level", put(set_log_level))
        .route("/hand-over", post(hand_over))
        .fallback(unknown)
        .method_not_allowed_fallback(not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(service)
}

async fn status(State(service): State<Service>) -> Json<Document> {
    Json(service.status.document().await)
}

async fn policies(State(service): State<Service>) -> Result<Json<Vec<PolicySummary>>, ErrorAnswer> {
    Ok(Json(service.policy()?.policies().await?))
}

/// Query of `GET /policy/pod`.
#[derive(Debug, Deserialize)]
struct PodQuery {
    name: String,
}

async fn policies_of_pod(
    State(service): State<Service>,
    query: Result<Query<PodQuery>, QueryRejection>,
) -> Result<Json<Vec<PodReport>>, ErrorAnswer> {
    let Query(PodQuery { name }) =
        query.map_err(|rejection| ErrorAnswer(rejection.status(), rejection.body_text()))?;
    let reports = service.policy()?.pod(&name).await?;
    if reports.is_empty() {
        let text = format!("this node has no pod {name:?}. Use NAMESPACE/NAME.");
        return Err(ErrorAnswer(StatusCode::NOT_FOUND, text));
    }
    Ok(Json(reports))
}

async fn rotate_key(
    State(service): State<Service>,
    body: Result<Json<KeyRotationBody>, JsonRejection>,
) -> Result<Json<RotationStatus>, ErrorAnswer> {
    let Json(KeyRotationBody { at_once }) = body?;
    Ok(Json(service.rotate(at_once).await?))
}

async fn set_log_level(
    State(service): State<Service>,
    body: Result<Json<LogLevelBody>, JsonRejection>,
) -> Result<StatusCode, ErrorAnswer> {
    let Json(LogLevelBody { level }) = body?;
    service.senders.log_levels.set(level.as_deref()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Answers 101 and passes the connection on. The first request wins; a second one gets 409 until
/// the connection of the first has failed.
async fn hand_over(
    State(service): State<Service>,
    request: Request,
) -> Result<Response, ErrorAnswer> {
    let protocol = request.headers().get(header::UPGRADE);
    if protocol.is_none_or(|protocol| protocol != HAND_OVER_PROTOCOL) {
        let text = format!("the request needs the header Upgrade: {HAND_OVER_PROTOCOL}");
        return Err(ErrorAnswer(StatusCode::UPGRADE_REQUIRED, text));
    }
    let permit = service.senders.hand_over.try_reserve_owned().map_err(|error| match error {
        TrySendError::Full(_) => {
            let text = "another agent is already taking over".to_owned();
            ErrorAnswer(StatusCode::CONFLICT, text)
        }
        TrySendError::Closed(_) => {
            let text = "the agent is exiting".to_owned();
            ErrorAnswer(StatusCode::SERVICE_UNAVAILABLE, text)
        }
    })?;
    tokio::spawn(async move {
        match upgraded(request).await {
            Ok(connection) => drop(permit.send(connection)),
            Err(error) => {
                tracing::debug!(%error, "agent that requested the hand-over disconnected")
            }
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, HAND_OVER_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Waits until the answer 101 is sent; returns the blocking connection.
async fn upgraded(request: Request) -> io::Result<std_net::UnixStream> {
    let upgraded = hyper::upgrade::on(request).await.map_err(io::Error::other)?;
    let parts = upgraded.downcast::<TokioIo<UnixStream>>();
    let parts = parts.map_err(|_| io::Error::other("the connection is not a unix socket"))?;
    let connection = parts.io.into_inner().into_std()?;
    connection.set_nonblocking(false)?;
    Ok(connection)
}

impl Service {
    /// Returns the service of network policies.
    fn policy(&self) -> Result<PolicyService, ErrorAnswer> {
        self.status.agent.policy.borrow().clone().ok_or_else(|| {
            let text = match self.status.agent.config.policy.mode {
                PolicyMode::Off => "network policies have no effect: policy.mode is off",
                PolicyMode::Audit | PolicyMode::Enforce => "the agent is still starting",
            };
            ErrorAnswer(StatusCode::CONFLICT, text.to_owned())
        })
    }

    async fn rotate(&self, at_once: bool) -> Result<RotationStatus, RotationError> {
        let (answer, answered) = oneshot::channel();
        let asked = self.senders.rotate.send(RotationRequest { at_once, answer }).await;
        asked.map_err(|_| RotationError::Ending)?;
        answered.await.unwrap_or(Err(RotationError::Ending))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
