//! List and watch of one kind of objects, with types that hold only the fields of use.
//!
//! A list that follows another is never older than what the watch has reported, so that an API
//! server with an outdated cache cannot make known objects disappear. A list that breaks off
//! reports no end.

use std::marker::PhantomData;
use std::time::Duration;

use futures_util::{AsyncBufReadExt, StreamExt};
use kube::Client;
use kube::api::{ListParams, VersionMatch, WatchParams};
use kube::core::Request;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use skein_cni_protocol::excerpt::message_excerpt;
use skein_policy::api::ObjectMeta;
use tokio::time::Instant;

use super::super::backoff::{RetryBackoff, random_fraction};
use super::super::client::{WATCH_RENEWAL_SECONDS, describe};

/// Interval at which a resource that the cluster does not have is requested again; up to 1.5 times
/// as long.
const ABSENT_INTERVAL: Duration = Duration::from_secs(60);
/// Time for which a resource must be absent until its known objects count as deleted. An API server
/// that starts may not know its custom resources yet.
const ABSENT_DELAY: Duration = Duration::from_secs(60);
/// Number of objects in a page of a list in pages.
const PAGE_SIZE: u32 = 500;
/// Minimum time between the starts of two watches.
const MIN_PERIOD: Duration = Duration::from_secs(1);
/// Time after the end of a watch's period at which a silent connection counts as lost.
const SILENCE_MARGIN: Duration = Duration::from_secs(10);

/// HTTP status: the resource does not exist.
const NOT_FOUND: u16 = 404;
/// HTTP statuses after which only a new list leads on: invalid version, expired version, and a
/// version that the API server has not reached.
const RELIST: [u16; 3] = [400, 410, 504];

/// Selection of the objects to list and watch.
#[derive(Debug, Clone, Default)]
pub(super) struct Query {
    /// Path of the resource, for example `/api/v1/pods`.
    pub(super) path: String,
    /// Field selector of the request.
    pub(super) fields: Option<String>,
    /// Label selector of the request.
    pub(super) labels: Option<String>,
    /// Requests only the metadata of the objects.
    pub(super) metadata_only: bool,
    /// Requests lists in pages, which bounds the memory of a long list. The API server's cache,
    /// which protects etcd, serves pages from Kubernetes 1.31 on.
    pub(super) paged: bool,
    /// The cluster may not have the resource.
    pub(super) optional: bool,
}

/// A report of a watch.
#[derive(Debug)]
pub(super) enum Report<T> {
    /// A list begins; [`Report::Upsert`] reports its objects.
    ListStarted,
    /// An object of a list, or one that is new or has changed.
    Upsert(T),
    /// The list is complete: other objects do not exist.
    ListComplete,
    /// An object with this name does not exist or is not selected any more.
    Remove(ObjectMeta),
    /// An object that exists and cannot be read, with the error. Its last readable version counts.
    Unreadable(ObjectMeta, String),
    /// The API server answers.
    Connected,
    /// The objects may be outdated, for this reason.
    Failed(String),
}

/// Receiver of the reports of a watch.
pub(super) trait Receiver<T> {
    /// Error that ends the watch.
    type Error: Send;

    /// Receives a report.
    ///
    /// # Errors
    /// The watch ends.
    fn receive(
        &mut self,
        report: Report<T>,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

#[derive(Deserialize)]
struct List<T> {
    metadata: ListMeta,
    #[serde(default = "Vec::new")]
    items: Vec<T>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMeta {
    #[serde(default)]
    resource_version: String,
    #[serde(default, rename = "continue")]
    next: String,
}

/// A line of a watch.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "type")]
    kind: String,
    object: Value,
}

/// Reason why a request has failed.
enum RequestError {
    /// The cluster does not have the resource.
    Absent,
    /// A new list is needed.
    Relist(String),
    /// The request is repeated.
    Retry(String),
}

impl From<kube::Error> for RequestError {
    fn from(error: kube::Error) -> Self {
        let code = match &error {
            kube::Error::Api(status) => status.code,
            _ => 0,
        };
        match code {
            NOT_FOUND => Self::Absent,
            code if RELIST.contains(&code) => Self::Relist(describe(&error)),
            _ => Self::Retry(describe(&error)),
        }
    }
}

impl From<serde_json::Error> for RequestError {
    fn from(error: serde_json::Error) -> Self {
        Self::Retry(format!("answer of the API server: {error}"))
    }
}

/// Reason for the end of an attempt.
enum Interruption<E> {
    /// The receiver has ended the watch.
    Receiver(E),
    Request(RequestError),
}

impl<E> From<RequestError> for Interruption<E> {
    fn from(error: RequestError) -> Self {
        Self::Request(error)
    }
}

impl<E> From<kube::Error> for Interruption<E> {
    fn from(error: kube::Error) -> Self {
        Self::Request(error.into())
    }
}

/// Lists and watches objects until the receiver returns an error, which is returned.
pub(super) async fn follow<T, R>(client: Client, query: Query, receiver: R) -> R::Error
where
    T: DeserializeOwned + Send,
    R: Receiver<T> + Send,
{
    // The nodes of a cluster renew their watches at different times.
    let renewal =
        WATCH_RENEWAL_SECONDS + (f64::from(WATCH_RENEWAL_SECONDS / 2) * random_fraction()) as u32;
    let mut follower = Follower {
        kind: PhantomData,
        client,
        request: Request::new(query.path.clone()),
        query,
        receiver,
        renewal,
        version: "0".to_owned(),
        is_listed: false,
        has_objects: false,
        absent_since: None,
    };
    let mut backoff = RetryBackoff::default();
    loop {
        let started = Instant::now();
        let attempt = match follower.is_listed {
            // The watch follows a list without a delay.
            false => match follower.list().await {
                Ok(()) => continue,
                error => error,
            },
            true => follower.watch().await,
        };
        let delay = match attempt {
            // A server that ends its watches early gets no more requests than after an error.
            Ok(()) => MIN_PERIOD.saturating_sub(started.elapsed()),
            Err(Interruption::Receiver(error)) => return error,
            Err(Interruption::Request(RequestError::Absent)) if follower.query.optional => {
                if let Err(error) = follower.on_absent().await {
                    return error;
                }
                ABSENT_INTERVAL.mul_f64(1.0 + 0.5 * random_fraction())
            }
            Err(Interruption::Request(error)) => {
                if let Err(error) = follower.on_failure(error).await {
                    return error;
                }
                backoff.next().unwrap_or_default()
            }
        };
        tokio::time::sleep(delay).await;
    }
}

struct Follower<T, R> {
    kind: PhantomData<fn() -> T>,
    client: Client,
    request: Request,
    query: Query,
    receiver: R,
    /// Period of a watch in seconds.
    renewal: u32,
    /// Version of the last complete list or of a later event; `0` for any version that the API
    /// server has in its cache; empty for the newest version.
    version: String,
    /// True after a complete list, until the watch cannot continue at the version.
    is_listed: bool,
    /// True if objects have been reported.
    has_objects: bool,
    /// Time since which the cluster has not had the resource.
    absent_since: Option<Instant>,
}

impl<T: DeserializeOwned + Send, R: Receiver<T> + Send> Follower<T, R> {
    /// Lists all objects and takes the version at which the watch continues.
    async fn list(&mut self) -> Result<(), Interruption<R::Error>> {
        self.report(Report::ListStarted).await?;
        let mut parameters = ListParams {
            label_selector: self.query.labels.clone(),
            field_selector: self.query.fields.clone(),
            ..ListParams::default()
        };
        if self.query.paged {
            parameters.limit = Some(PAGE_SIZE);
        } else if !self.version.is_empty() {
            parameters.resource_version = Some(self.version.clone());
            parameters.version_match = Some(VersionMatch::NotOlderThan);
        }
        loop {
            let metadata = self.list_page(&parameters).await?;
            if metadata.next.is_empty() {
                self.version = metadata.resource_version;
                break;
            }
            parameters.continue_token = Some(metadata.next);
        }
        self.report(Report::ListComplete).await?;
        self.report(Report::Connected).await?;
        (self.is_listed, self.absent_since) = (true, None);
        Ok(())
    }

    async fn list_page(
        &mut self,
        parameters: &ListParams,
    ) -> Result<ListMeta, Interruption<R::Error>> {
        let request = match self.query.metadata_only {
            true => self.request.list_metadata(parameters),
            false => self.request.list(parameters),
        };
        let request = request.map_err(kube::Error::BuildRequest)?;
        let text = self.client.request_text(request).await?;
        if let Ok(List { metadata, items }) = serde_json::from_str::<List<T>>(&text) {
            for item in items {
                self.upsert(item).await?;
            }
            return Ok(metadata);
        }
        // An object cannot be read: the others are read nevertheless.
        let list = serde_json::from_str::<List<Value>>(&text).map_err(RequestError::from)?;
        for item in list.items {
            match T::deserialize(&item) {
                Ok(item) => self.upsert(item).await?,
                Err(error) => self.report(unreadable(&item, &error)).await?,
            }
        }
        Ok(list.metadata)
    }

    /// Watches from the present version to the end of the period.
    async fn watch(&mut self) -> Result<(), Interruption<R::Error>> {
        let parameters = WatchParams {
            label_selector: self.query.labels.clone(),
            field_selector: self.query.fields.clone(),
            timeout: Some(self.renewal),
            bookmarks: true,
            send_initial_events: false,
        };
        let request = match self.query.metadata_only {
            true => self.request.watch_metadata(&parameters, &self.version),
            false => self.request.watch(&parameters, &self.version),
        };
        let request = request.map_err(kube::Error::BuildRequest)?;
        let stream = self.client.request_stream(request).await?;
        let mut lines = std::pin::pin!(stream.lines());
        self.report(Report::Connected).await?;
        let silence = Duration::from_secs(self.renewal.into()) + SILENCE_MARGIN;
        loop {
            let line = match tokio::time::timeout(silence, lines.next()).await {
                Ok(Some(Ok(line))) => line,
                Ok(None) => return Ok(()),
                Ok(Some(Err(error))) => {
                    let text = format!("connection to the API server lost: {error}");
                    return Err(RequestError::Retry(text).into());
                }
                Err(_) => {
                    let text = format!("no message from the API server for {silence:?}");
                    return Err(RequestError::Retry(text).into());
                }
            };
            // A broken connection cuts its last line off.
            let line = serde_json::from_str::<Line>(&line).map_err(RequestError::from)?;
            self.on_line(line).await?;
        }
    }

    async fn on_line(&mut self, line: Line) -> Result<(), Interruption<R::Error>> {
        let Line { kind, object } = line;
        if kind == "ERROR" {
            let code = object["code"].as_u64().unwrap_or_default();
            let message = object["message"].as_str().unwrap_or("the watch has failed");
            let message = message_excerpt(message).into_owned();
            let relist = RELIST.iter().any(|status| u64::from(*status) == code);
            return Err(match relist {
                true => RequestError::Relist(message).into(),
                false => RequestError::Retry(message).into(),
            });
        }
        let version = object["metadata"]["resourceVersion"].as_str().map(str::to_owned);
        match kind.as_str() {
            "ADDED" | "MODIFIED" => match T::deserialize(&object) {
                Ok(object) => self.upsert(object).await?,
                Err(error) => self.report(unreadable(&object, &error)).await?,
            },
            "DELETED" => self.report(Report::Remove(identity(&object))).await?,
            // Bookmarks carry a version only.
            _ => {}
        }
        // The version advances after the receiver has the event: a repeated event is harmless.
        if let Some(version) = version.filter(|version| !version.is_empty()) {
            self.version = version;
        }
        Ok(())
    }

    async fn upsert(&mut self, object: T) -> Result<(), Interruption<R::Error>> {
        self.has_objects = true;
        self.report(Report::Upsert(object)).await
    }

    async fn report(&mut self, report: Report<T>) -> Result<(), Interruption<R::Error>> {
        self.receiver.receive(report).await.map_err(Interruption::Receiver)
    }

    /// Handles the absence of the resource: an empty list, as soon as the absence is certain.
    async fn on_absent(&mut self) -> Result<(), R::Error> {
        let since = *self.absent_since.get_or_insert_with(Instant::now);
        (self.is_listed, self.version) = (false, String::new());
        if !self.has_objects || since.elapsed() >= ABSENT_DELAY {
            self.receiver.receive(Report::ListStarted).await?;
            self.receiver.receive(Report::ListComplete).await?;
            self.has_objects = false;
        }
        self.receiver.receive(Report::Connected).await
    }

    async fn on_failure(&mut self, error: RequestError) -> Result<(), R::Error> {
        let text = match error {
            RequestError::Absent => "the cluster does not have the resource".to_owned(),
            RequestError::Relist(text) => {
                // A list that fails at the version asks for the newest one.
                if !self.is_listed {
                    self.version.clear();
                }
                self.is_listed = false;
                text
            }
            RequestError::Retry(text) => text,
        };
        self.receiver.receive(Report::Failed(text)).await
    }
}

/// Returns the report of an object that cannot be read.
fn unreadable<T>(object: &Value, error: &serde_json::Error) -> Report<T> {
    Report::Unreadable(identity(object), message_excerpt(&error.to_string()).into_owned())
}

/// Returns the name and namespace of an object, the rest of which may be unreadable.
fn identity(object: &Value) -> ObjectMeta {
    let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default().to_owned();
    ObjectMeta { name: text("name"), namespace: text("namespace"), ..ObjectMeta::default() }
}
