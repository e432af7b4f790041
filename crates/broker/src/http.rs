//! Health and metrics over HTTP, for orchestrators and Prometheus.
//!
//! | path | answer |
//! |---|---|
//! | `/health/live` | 200 while the broker can work at all, 503 when it should be started anew |
//! | `/health/ready` | 200 while calls are taken, 503 while it stops or when the store has failed; the body says how that is |
//! | `/metrics` | the text format of Prometheus, without names of clients |
//!
//! A full or damaged store is ready: it gives what it has, and receiving is what makes room.

use std::{fmt::Write as _, sync::Arc};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::IntoResponse,
    routing::get,
};
use serde_json::json;
use tokio::net::TcpListener;

use crate::{broker::Shared, queue::QueueStats};

/// Channels of each pattern that have figures of their own; the sums are of all.
const OWN: usize = 1000;

/// Serves until it is dropped.
pub(crate) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let router = Router::new()
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(shared);
    if let Err(cause) = axum::serve(listener, router).await {
        tracing::error!(%cause, "health and metrics are served no more");
    }
}

async fn live(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    if shared.store.is_alive() || shared.stopping.is_cancelled() {
        (StatusCode::OK, Json(json!({ "status": "live" })))
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "status": "the store writes no more: start the broker anew" })))
    }
}

async fn ready(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let (code, status) = if shared.stopping.is_cancelled() {
        (StatusCode::SERVICE_UNAVAILABLE, "stopping")
    } else if shared.store.failed().is_some() {
        (StatusCode::SERVICE_UNAVAILABLE, "the store writes no more: start the broker anew")
    } else {
        (StatusCode::OK, "ready")
    };
    let room = shared.store.room();
    let store = json!({
        "bytes": room.used(),
        "refuses": room.refusal().map(|why| why.to_string()),
        "failed": shared.store.failed().map(|why| why.to_string()),
        "damage": shared.store.damage().map(|why| why.to_string()),
    });
    (code, Json(json!({ "status": status, "store": store })))
}

async fn metrics(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text(&shared))
}

/// Figures in the text format of Prometheus.
#[derive(Default)]
struct Figures(String);

impl Figures {
    /// A figure's head; `kind` is `counter` or `gauge`.
    fn about(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP polymq_broker_{name} {help}\n# TYPE polymq_broker_{name} {kind}\n");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.about(name, kind, help);
        let _ = writeln!(self.0, "polymq_broker_{name} {value}");
    }

    fn of(&mut self, name: &str, label: &str, of: &str, value: u64) {
        let of = of.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let _ = writeln!(self.0, "polymq_broker_{name}{{{label}=\"{of}\"}} {value}");
    }
}

fn text(shared: &Shared) -> String {
    let mut figures = Figures::default();
    let (room, counts) = (shared.store.room(), &shared.counts);
    figures.one("uptime_seconds", "gauge", "Seconds since the start.", shared.uptime().as_secs());
    figures.one("connections", "gauge", "Open connections.", counts.connections.now());
    figures.one("connections_refused_total", "counter", "Connections beyond the limit.", counts.refused.now());
    figures.one("unauthenticated_total", "counter", "Calls without a good token.", counts.unauthenticated.now());
    figures.one("denied_total", "counter", "Requests that no rule allows.", counts.denied.now());
    figures.one("events_lost_total", "counter", "Events lost for subscribers that were slow.", counts.lost.now());
    figures.one("transactions", "gauge", "Polls with messages that are not settled.", shared.transactions.count());
    let under_way = shared.under_way.now();
    figures.one("requests_bytes", "gauge", "Bytes of requests that are coming in or worked on.", under_way);
    figures.one("store_bytes", "gauge", "Bytes that are stored.", room.used());
    figures.one("store_full", "gauge", "1 while messages are refused for want of room.", u8::from(room.is_full()));
    let damaged = u8::from(shared.store.damage().is_some());
    figures.one("store_damaged", "gauge", "1 when stored data were found to be damaged.", damaged);
    let (commits, time) = shared.store.commits();
    figures.one("commits_total", "counter", "Transactions on disk.", commits);
    figures.one("commit_seconds_total", "counter", "Seconds that they took.", time.as_secs_f64());

    let queues: Vec<_> = shared.queues.all().into_iter().map(|queue| (queue.name.clone(), queue.stats())).collect();
    type Figure = (&'static str, &'static str, &'static str, fn(&QueueStats) -> u64);
    let of_queues: [Figure; 6] = [
        ("messages", "gauge", "Messages that wait or are held.", |stats| stats.messages),
        ("bytes", "gauge", "Bytes of them.", |stats| stats.bytes),
        ("held", "gauge", "Messages that are held by consumers.", |stats| stats.held),
        ("sent_total", "counter", "Messages that came in since the start.", |stats| stats.incoming),
        ("delivered_total", "counter", "Deliveries since the start.", |stats| stats.outgoing),
        ("expired_total", "counter", "Messages whose time was over.", |stats| stats.expired),
    ];
    figures.one("queues", "gauge", "Queues.", queues.len());
    for (name, kind, help, figure) in of_queues {
        let sum: u64 = queues.iter().map(|(_, stats)| figure(stats)).sum();
        figures.one(&format!("all_queues_{name}"), kind, help, sum);
        figures.about(&format!("queue_{name}"), kind, help);
        for (queue, stats) in queues.iter().take(OWN) {
            figures.of(&format!("queue_{name}"), "queue", queue, figure(stats));
        }
    }

    let logs = shared.logs.all();
    figures.one("event_channels", "gauge", "Channels of stored events.", logs.len());
    figures.about("events_stored_total", "counter", "Events that were stored, ever.");
    logs.iter().take(OWN).for_each(|log| figures.of("events_stored_total", "channel", &log.name, log.count()));
    figures.about("events_kept", "gauge", "Stored events that are kept.");
    logs.iter().take(OWN).for_each(|log| figures.of("events_kept", "channel", &log.name, log.kept.size().0));
    figures.about("events_kept_bytes", "gauge", "Bytes of them.");
    logs.iter().take(OWN).for_each(|log| figures.of("events_kept_bytes", "channel", &log.name, log.kept.size().1));
    figures.about("subscribers", "gauge", "Who listens to what is not stored.");
    for kind in ["events", "commands", "queries"] {
        figures.of("subscribers", "kind", kind, shared.listened(kind).len() as u64);
    }
    figures.0
}
