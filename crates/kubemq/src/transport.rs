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

    /// Takes the token that was read from the settings.
    pub(crate) fn set(&self, token: Option<&Secret>) -> Result<(), InvalidHeaderValue> {
        let value = token.map(header).transpose()?;
        *self.0.last.write().unwrap_or_else(PoisonError::into_inner) = value;
        Ok(())
    }

    /// A file that cannot be used at this moment, because it is being written, leaves the one that it had.
    fn get(&self) -> Option<HeaderValue> {
        let read = self.0.file.as_ref().and_then(|file| Secret::read("token_file", file).ok());
        let new = read.and_then(|token| header(&token).ok()).filter(|token| !token.is_empty());
        new.or_else(|| self.0.last.read().unwrap_or_else(PoisonError::into_inner).clone())
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
