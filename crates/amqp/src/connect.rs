//! One attempt to connect: where, with which trust, as whom, and what went wrong.

use std::sync::Arc;

use lapin::{Connection, ConnectionProperties};
use polymq_core::{Error, Result};
use tokio::time::{Instant, timeout_at};

use crate::{
    config::AmqpConfig,
    error::{self, Stage},
    link::Role,
    socket::Control,
    transport::{self, Tls},
};

/// A connection, and its socket.
#[derive(Debug, Clone)]
pub(crate) struct Wire {
    pub(crate) connection: Arc<Connection>,
    pub(crate) control: Control,
}

/// One attempt to connect and to log in, bounded.
pub(crate) async fn connect(config: &Arc<AmqpConfig>, role: Role) -> Result<Wire> {
    let endpoint = config.endpoint()?;
    let tls = tls(config, endpoint.tls).await?;
    let properties = ConnectionProperties::default()
        .with_connection_name(format!("{} ({})", config.name, role.name()).into())
        .with_client_property("product".into(), "polymq".into())
        .with_client_property("version".into(), env!("CARGO_PKG_VERSION").into());
    let uri = endpoint.uri(config.heartbeat);
    let deadline = Instant::now() + config.connect_timeout;
    let failed = |error| with_place(error, &endpoint.to_string());
    let silent = || failed(error::disconnected("connect", "no answer in time"));
    let native = |error| failed(error::native("connect", error, Stage::Login));
    let opened = timeout_at(deadline, transport::open(&uri, tls)).await;
    let (socket, control) = opened.map_err(|_| silent())?.map_err(|error| native(error.into()))?;
    let unless_logged_in = AbortOnDrop(Some(control.clone()));
    match timeout_at(deadline, transport::log_in(socket, uri, endpoint.login(), properties)).await {
        Ok(Ok(connection)) => {
            unless_logged_in.disarm();
            Ok(Wire { connection: Arc::new(connection), control })
        }
        Ok(Err(error)) => Err(native(error)),
        Err(_) => Err(silent()),
    }
}

/// Ends the socket of an attempt that is given up, by its own time-out or because whoever waited for it does not any more:
/// the thread of the client library holds it, and would wait for the broker for ever.
struct AbortOnDrop(Option<Control>);

impl AbortOnDrop {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(control) = &self.0 {
            control.abort();
        }
    }
}

fn with_place(error: Error, place: &str) -> Error {
    let message = format!("{} ({place})", error.message());
    let hint = error.hint().map(str::to_owned);
    let mut placed = Error::new(error.kind(), message).with_backend(crate::NAME).with_operation("connect");
    if let Some(hint) = hint {
        placed = placed.with_hint(hint);
    }
    placed.with_source(error)
}

#[cfg(feature = "tls")]
async fn tls(config: &Arc<AmqpConfig>, needed: bool) -> Result<Option<Tls>> {
    if !needed {
        return Ok(None);
    }
    let config = Arc::clone(config);
    match tokio::task::spawn_blocking(move || Tls::load(&config)).await {
        Ok(loaded) => loaded.map(Some),
        Err(_) => Err(error::closed("connect")),
    }
}

#[cfg(not(feature = "tls"))]
async fn tls(_: &Arc<AmqpConfig>, _: bool) -> Result<Option<Tls>> {
    Ok(None)
}
