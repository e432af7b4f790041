//! What carries the calls: a network channel, or a broker in this process without any socket.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
};

use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderValue, Request, Response, header::AUTHORIZATION};
use polymq_kubemq_proto::kubemq_client::KubemqClient;
use tonic::{body::Body, codegen::Service, transport::Channel};

/// The stub of the protocol over either.
pub(crate) type Client = KubemqClient<Transport>;

/// Answers gRPC calls in this process.
pub type InProcess = Arc<dyn Fn(Request<Body>) -> BoxFuture<'static, Response<Body>> + Send + Sync>;

/// The token of every call; a new one counts for the next call on every connection that shares it.
#[derive(Clone, Default)]
pub(crate) struct Token(Arc<RwLock<Option<HeaderValue>>>);

impl Token {
    pub(crate) fn set(&self, token: Option<HeaderValue>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = token;
    }

    fn get(&self) -> Option<HeaderValue> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
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
