//! A connector that connects once. A channel of the client library connects again by itself, and without a pause where the broker
//! ends each connection before its first call; here the link connects again, with a backoff, as for every backend.

use std::{
    error::Error,
    io,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, TryFutureExt, future, future::BoxFuture};
use http::Uri;
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use tokio::net::TcpStream;
use tonic::codegen::Service;

/// What a call gets whose channel has ended: it was not sent.
pub(crate) const ENDED: &str = "the connection has ended";

/// After how long without traffic the operating system asks whether the peer is there.
const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// Makes one connection; whoever asks for a second gets [`ENDED`].
pub(crate) struct Dial(Option<HttpConnector>);

impl Dial {
    pub(crate) fn new(connect_timeout: Duration) -> Self {
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_keepalive(Some(KEEP_ALIVE));
        connector.set_connect_timeout(Some(connect_timeout));
        Self(Some(connector))
    }
}

impl Service<Uri> for Dial {
    type Response = TokioIo<TcpStream>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        match &mut self.0 {
            Some(connector) => connector.poll_ready(cx).map_err(Into::into),
            None => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, place: Uri) -> Self::Future {
        match self.0.take() {
            Some(mut connector) => connector.call(place).err_into().boxed(),
            None => future::err(io::Error::new(io::ErrorKind::NotConnected, ENDED).into()).boxed(),
        }
    }
}
