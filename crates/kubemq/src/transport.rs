//! What carries the calls: a network channel, or a broker in this process without any socket.

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
};

use futures_util::{FutureExt, future::BoxFuture};
use http::{
    HeaderValue, Request, Response,
    header::{AUTHORIZATION, InvalidHeaderValue},
};
use polymq_core::Secret;
use polymq_kubemq_proto::kubemq_client::KubemqClient;
use tonic::{body::Body, codegen::Service, transport::Channel};

/// The stub of the protocol over either.
pub(crate) type Client = KubemqClient<Transport>;

/// Answers gRPC calls in this process.
pub type InProcess = Arc<dyn Fn(Request<Body>) -> BoxFuture<'static, Response<Body>> + Send + Sync>;

/// The token of every call. A new one counts for the next call on every connection that shares it, and so does one that
/// was written into its file.
#[derive(Clone, Default)]
pub(crate) struct Token(Arc<Source>);

#[derive(Default)]
struct Source {
    last: RwLock<Option<HeaderValue>>,
    file: Option<PathBuf>,
}

impl Token {
    pub(crate) fn of(file: Option<PathBuf>) -> Self {
        Self(Arc::new(Source { last: RwLock::default(), file }))
    }

    /// Takes the token that was read from the settings. An empty one, of a file that is being written, leaves what there was.
    pub(crate) fn set(&self, token: Option<&Secret>) -> Result<(), InvalidHeaderValue> {
        let Some(token) = token.filter(|token| !token.expose().trim().is_empty()) else { return Ok(()) };
        let value = header(token)?;
        if self.last().as_ref() != Some(&value) {
            *self.0.last.write().unwrap_or_else(PoisonError::into_inner) = Some(value);
        }
        Ok(())
    }

    fn get(&self) -> Option<HeaderValue> {
        if let Some(file) = &self.0.file {
            let read = Secret::read("token_file", file).map(|token| self.set(Some(&token)));
            if !matches!(read, Ok(Ok(()))) {
                tracing::debug!("the file of the token cannot be used; the last one counts");
            }
        }
        self.last()
    }

    fn last(&self) -> Option<HeaderValue> {
        self.0.last.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn header(token: &Secret) -> Result<HeaderValue, InvalidHeaderValue> {
    let mut value = HeaderValue::from_str(token.expose().trim())?;
    value.set_sensitive(true);
    Ok(value)
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

#[derive(Clone)]
enum Carrier {
    Network(Channel),
    InProcess(InProcess),
}

/// One of the two, with the token that every call carries.
#[derive(Clone)]
pub(crate) struct Transport {
    carrier: Carrier,
    token: Token,
}

impl Transport {
    pub(crate) fn network(channel: Channel, token: Token) -> Self {
        Self { carrier: Carrier::Network(channel), token }
    }

    pub(crate) fn in_process(service: InProcess) -> Self {
        Self { carrier: Carrier::InProcess(service), token: Token::default() }
    }

    /// What a queue gives at once may be as large as the server allows: the bound is on what is asked for.
    pub(crate) fn client(self) -> Client {
        KubemqClient::new(self).max_decoding_message_size(usize::MAX)
    }
}

impl Service<Request<Body>> for Transport {
    type Response = Response<Body>;
    type Error = tonic::transport::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        match &mut self.carrier {
            Carrier::Network(channel) => channel.poll_ready(cx),
            Carrier::InProcess(_) => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        if let Some(token) = self.token.get() {
            request.headers_mut().insert(AUTHORIZATION, token);
        }
        match &mut self.carrier {
            Carrier::Network(channel) => channel.call(request).boxed(),
            Carrier::InProcess(service) => service(request).map(Ok).boxed(),
        }
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.carrier {
            Carrier::Network(_) => "Transport::Network",
            Carrier::InProcess(_) => "Transport::InProcess",
        })
    }
}
