//! One attempt to connect: a channel, a ping, and a call that asks for the token, since the ping does not.

use std::sync::Arc;

use polymq_core::{Error, ErrorKind, Result};
use polymq_kubemq_proto::{Empty, PingResult, QueuesInfoRequest};
use tokio::time::timeout;
use tonic::transport::Endpoint;

use crate::{
    NAME,
    config::KubeMqConfig,
    dial::Dial,
    error::{self, Effect, native},
    transport::{Client, InProcess, Token, Transport},
};

/// Versions of the server whose protocol is this one.
const MAJOR: &str = "2";

/// Where the broker is.
#[derive(Clone)]
pub(crate) enum Target {
    /// Where the settings say.
    Network,
    /// In this process.
    InProcess(InProcess),
}

/// Connects, asks who is there, and whether the token is good.
pub(crate) async fn connect(config: &KubeMqConfig, target: &Target, token: &Token) -> Result<(Client, PingResult)> {
    let attempt = async {
        let (client, tls) = match target {
            Target::InProcess(service) => (Transport::in_process(Arc::clone(service)).client(), false),
            Target::Network => network(config, token).await?,
        };
        match ask(&client).await {
            Ok(about) => Ok((client, about)),
            // From TLS 1.3 on, that is how a client learns that its certificate was not accepted.
            Err(error) if tls && error.kind() == ErrorKind::Disconnected => Err(error.with_hint(
                "a broker that asks for certificates ends the connection of a client that it does not know: check cert_file \
                 and key_file",
            )),
            Err(error) => Err(error),
        }
    };
    timeout(config.connect_timeout, attempt)
        .await
        .unwrap_or_else(|_| Err(error::disconnected("connect", "no answer in time")))
}

/// A ping and a call that is refused without a good token. A server that does not know that call has let us in.
pub(crate) async fn ask(client: &Client) -> Result<PingResult> {
    let mut client = client.clone();
    let failed = |status| native("connect", Effect::Idempotent, status);
    let about = client.ping(Empty {}).await.map_err(failed)?.into_inner();
    let nothing = QueuesInfoRequest { request_id: "polymq".to_owned(), queue_name: "polymq".to_owned() };
    match client.queues_info(nothing).await.map_err(failed) {
        Err(error) if !matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::PermissionDenied) => Err(error),
        _ => Ok(about),
    }
}

/// Says once that a server is of another generation than this client was made for.
pub(crate) fn check_version(about: &PingResult) {
    if about.version.split('.').next() != Some(MAJOR) {
        tracing::warn!(
            host = about.host,
            version = about.version,
            "this server's version is not 2.x, for which this client was made; it may behave in another way"
        );
    }
}

/// A connection, and whether it is encrypted.
async fn network(config: &KubeMqConfig, token: &Token) -> Result<(Client, bool)> {
    let place = config.place()?;
    let taken = token.set(place.token.as_ref());
    taken.map_err(|_| error::config("the token holds characters that no token has"))?;
    let endpoint = Endpoint::from_shared(place.uri())
        .map_err(|cause| error::config(format!("the address is not valid: {cause}")))?
        // As much as there can be: each stream has its own bound, and one that nobody reads stops no other.
        .initial_connection_window_size((1 << 31) - 1)
        .initial_stream_window_size(4 << 20)
        .connect_timeout(config.connect_timeout);
    #[cfg(feature = "tls")]
    let endpoint = if place.tls { with_tls(endpoint, config, place.host())? } else { endpoint };
    let channel = endpoint.connect_with_connector(Dial::new(config.connect_timeout)).await.map_err(|cause| {
        let reason = reason(&cause);
        let error = error::disconnected("connect", &format!("{}: {reason}", place.host())).with_source(cause);
        match place.tls && reason.contains("certificate") {
            true => error.with_hint("check ca_file and server_name"),
            false => error,
        }
    })?;
    Ok((Transport::network(channel, token.clone()).client(), place.tls))
}

#[cfg(feature = "tls")]
fn with_tls(endpoint: Endpoint, config: &KubeMqConfig, host: &str) -> Result<Endpoint> {
    use tonic::transport::{Certificate, ClientTlsConfig, Identity};
    let read = |setting: &str, path: &std::path::Path| {
        std::fs::read(path).map_err(|cause| {
            error::config(format!("setting {setting:?}: {path:?} is not usable: {cause}"))
                .with_hint("give the path of a PEM file that this process may read")
        })
    };
    let name = config.server_name.as_deref().unwrap_or(host);
    let mut tls = ClientTlsConfig::new().with_native_roots().domain_name(name);
    if let Some(path) = &config.ca_file {
        tls = tls.ca_certificate(Certificate::from_pem(read("ca_file", path)?));
    }
    if let (Some(cert), Some(key)) = (&config.cert_file, &config.key_file) {
        tls = tls.identity(Identity::from_pem(read("cert_file", cert)?, read("key_file", key)?));
    }
    endpoint.tls_config(tls).map_err(|cause| {
        error::config(format!("the certificates of the settings are not usable: {}", reason(&cause)))
            .with_hint("check ca_file, cert_file, key_file and server_name")
    })
}

/// The innermost cause, which says most.
fn reason(error: &dyn std::error::Error) -> String {
    let mut last = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        last = error.to_string();
        source = error.source();
    }
    last
}

/// The error of a first attempt, with what to do about it.
pub(crate) fn first(error: Error, config: &KubeMqConfig) -> Error {
    match (error.kind(), config.place()) {
        (ErrorKind::Disconnected, Ok(place)) if error.hint().is_none() => error
            .with_backend(NAME)
            .with_hint(format!("is a broker listening at {}? `polymq broker` starts one", place.uri())),
        _ => error,
    }
}
