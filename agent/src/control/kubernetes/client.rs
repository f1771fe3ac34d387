//! Connection to the API server, and counters of the requests.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use kube::client::{Body, ClientBuilder};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, Opts};
use skein_cni_protocol::excerpt::message_excerpt;
use tower::timeout::TimeoutLayer;
use tower::util::MapRequestLayer;

use crate::failure::Failure;

/// Minimum time after which a watch is renewed, seconds; the maximum is 1.5 times as long. A
/// connection from an address that this node has lost, or to a server that is gone, reports no
/// error, and is only detected by the renewal.
pub(super) const WATCH_RENEWAL_SECONDS: u32 = 60;

/// Timeout of a connection attempt to the API server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Timeout from a request to the first byte of its answer.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum pause within an answer. A watch without events pauses until its renewal, after 90 s at
/// most.
const READ_TIMEOUT: Duration = Duration::from_secs(WATCH_RENEWAL_SECONDS as u64 * 2);

const VERBS: [&str; 5] = ["list", "watch", "create", "patch", "delete"];

/// Counters of requests to the API server.
#[derive(Debug, Clone)]
pub struct Requests(IntCounterVec);

impl Requests {
    /// Returns counters whose series are all at zero.
    ///
    /// # Errors
    /// [`Failure::Runtime`] if the definition of the metric is invalid.
    pub fn new() -> Result<Self, Failure> {
        let name = "skein_kubernetes_requests_total";
        let help = "Requests to the Kubernetes API server by verb.";
        let total = IntCounterVec::new(Opts::new(name, help), &["verb"]);
        let total = total.context("cannot count requests")?;
        for verb in VERBS {
            total.with_label_values(&[verb]);
        }
        Ok(Self(total))
    }

    /// Returns the metric families for a scrape.
    pub fn families(&self) -> Vec<MetricFamily> {
        self.0.collect()
    }

    fn count(&self, request: &http::Request<Body>) {
        let query = request.uri().query().unwrap_or_default();
        let verb = match *request.method() {
            http::Method::GET if query.contains("watch=true") => "watch",
            // The agent sends no other GET requests.
            http::Method::GET => "list",
            http::Method::POST => "create",
            http::Method::DELETE => "delete",
            _ => "patch",
        };
        self.0.with_label_values(&[verb]).inc();
    }
}

/// Creates a client of the cluster that this pod runs in, or that a kubeconfig names, and returns
/// it with the host of the API server. No request is sent yet.
///
/// # Errors
///
/// The kubeconfig cannot be read or names no cluster, the process does not run in a pod with a
/// service account, or TLS cannot be set up.
pub(super) async fn connect(
    kubeconfig: Option<&Path>,
    requests: &Requests,
) -> anyhow::Result<(Client, String)> {
    let mut config = match kubeconfig {
        Some(path) => {
            let shown = path.display();
            let file = Kubeconfig::read_from(path)
                .with_context(|| format!("cannot read kubernetes.kubeconfig = {shown}"))?;
            let read = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
            read.with_context(|| format!("kubernetes.kubeconfig = {shown} names no cluster"))?
        }
        None => Config::incluster().context(
            "this process does not run in a pod with a service account. Set kubernetes.kubeconfig.",
        )?,
    };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.read_timeout = Some(READ_TIMEOUT);
    config.reset_reader_on_write = true;
    // The client's own retries are 15 within seconds, not logged, and not spread over the nodes.
    // The callers retry with `RetryBackoff`.
    config.default_retry = false;
    let server = config.cluster_url.host().unwrap_or_default().to_owned();
    let requests = requests.clone();
    let count = MapRequestLayer::new(move |request: http::Request<Body>| {
        requests.count(&request);
        request
    });
    let builder =
        ClientBuilder::try_from(config).context("cannot create a client of the cluster")?;
    let timeout = TimeoutLayer::new(RESPONSE_TIMEOUT);
    Ok((builder.with_layer(&timeout).with_layer(&count).build(), server))
}

/// Returns the cause of an error of the API server in one line, for messages.
pub(super) fn describe(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.code == 404 && status.message.starts_with("404 page") => {
            "the cluster does not know the resource SkeinNode. Run skein-agent crd | kubectl apply -f -"
                .to_owned()
        }
        kube::Error::Api(status) => message_excerpt(&status.message).into_owned(),
        // The sources of the error name the cause.
        other => {
            let mut text = other.to_string();
            let mut source = std::error::Error::source(other);
            while let Some(error) = source {
                let more = error.to_string();
                if !text.contains(&more) {
                    text = format!("{text}: {more}");
                }
                source = error.source();
            }
            message_excerpt(&text).into_owned()
        }
    }
}
