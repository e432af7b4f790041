//! Packets on a socket: rumqttc's codecs for both protocol versions behind one set of packet types, and TLS.
//!
//! Only the types of MQTT 5 are used above this file; what 3.1.1 cannot say is left out on the way down
//! ([`capabilities`](crate::topology::capabilities) tells users) and filled with "success" on the way up.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use polymq_core::Result;
pub(crate) use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::{
    mqttbytes::{self as v4base, v4},
    v5::mqttbytes::{self, QoS, v5},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_util::codec::{Decoder, Encoder};

use crate::config::{MqttConfig, Protocol};

/// The protocol's bound of a packet (section 2.1.4). Announcing less would make an MQTT 5 broker discard larger
/// messages silently (3.1.2.11.4), so nothing is announced and everything is read.
const MAX_PACKET: u32 = 268_435_455 + 5;

/// Both codecs of rumqttc as one.
#[derive(Debug, Clone)]
pub(crate) enum Codec {
    V5(v5::Codec),
    V311(v4::Codec),
}

impl Codec {
    pub(crate) fn new(protocol: Protocol) -> Self {
        match protocol {
            Protocol::V5 => Self::V5(v5::Codec { max_incoming_size: Some(MAX_PACKET), max_outgoing_size: None }),
            Protocol::V311 => {
                Self::V311(v4::Codec { max_incoming_size: MAX_PACKET as usize, max_outgoing_size: MAX_PACKET as usize })
            }
        }
    }
}

impl Encoder<Packet> for Codec {
    type Error = mqttbytes::Error;

    fn encode(&mut self, packet: Packet, into: &mut BytesMut) -> Result<(), Self::Error> {
        match self {
            Self::V5(codec) => codec.encode(packet, into),
            Self::V311(codec) => codec.encode(down(packet)?, into).map_err(io_error),
        }
    }
}

impl Decoder for Codec {
    type Item = Packet;
    type Error = mqttbytes::Error;

    fn decode(&mut self, from: &mut BytesMut) -> Result<Option<Packet>, Self::Error> {
        match self {
            Self::V5(codec) => codec.decode(from),
            Self::V311(codec) => codec.decode(from).map_err(io_error)?.map(up).transpose(),
        }
    }
}

fn io_error(error: v4base::Error) -> mqttbytes::Error {
    mqttbytes::Error::Io(io::Error::new(io::ErrorKind::InvalidData, error))
}

fn down(packet: Packet) -> Result<v4::Packet, mqttbytes::Error> {
    Ok(match packet {
        Packet::Publish(publish) => {
            let topic = String::from_utf8(publish.topic.into()).map_err(|_| mqttbytes::Error::TopicNotUtf8)?;
            let mut lower = v4::Publish::new(topic, down_qos(publish.qos), Vec::new());
            lower.payload = publish.payload;
            (lower.dup, lower.retain, lower.pkid) = (publish.dup, publish.retain, publish.pkid);
            v4::Packet::Publish(lower)
        }
        Packet::PubAck(ack) => v4::Packet::PubAck(v4::PubAck::new(ack.pkid)),
        Packet::PubRel(rel) => v4::Packet::PubRel(v4::PubRel::new(rel.pkid)),
        Packet::Subscribe(subscribe) => {
            let filters = subscribe.filters.into_iter();
            let filters = filters.map(|filter| v4::SubscribeFilter::new(filter.path, down_qos(filter.qos)));
            let mut lower = v4::Subscribe::new_many(filters);
            lower.pkid = subscribe.pkid;
            v4::Packet::Subscribe(lower)
        }
        Packet::Unsubscribe(unsubscribe) => {
            v4::Packet::Unsubscribe(v4::Unsubscribe { pkid: unsubscribe.pkid, topics: unsubscribe.filters })
        }
        Packet::PingReq(_) => v4::Packet::PingReq,
        Packet::Disconnect(_) => v4::Packet::Disconnect,
        Packet::Connect(connect, will, login) => {
            let mut lower = v4::Connect::new(connect.client_id);
            lower.keep_alive = connect.keep_alive;
            lower.clean_session = connect.clean_start;
            lower.login = login.map(|login| v4::Login::new(login.username, login.password));
            lower.last_will = will.and_then(|will| {
                let topic = String::from_utf8(will.topic.into()).ok()?;
                Some(v4::LastWill::new(topic, will.message, down_qos(will.qos), will.retain))
            });
            v4::Packet::Connect(lower)
        }
        // Nothing else is ever sent by a client.
        _ => return Err(mqttbytes::Error::IncorrectPacketFormat),
    })
}

fn up(packet: v4::Packet) -> Result<Packet, mqttbytes::Error> {
    Ok(match packet {
        v4::Packet::Publish(publish) => Packet::Publish(v5::Publish {
            dup: publish.dup,
            qos: up_qos(publish.qos),
            retain: publish.retain,
            topic: Bytes::from(publish.topic),
            pkid: publish.pkid,
            payload: publish.payload,
            properties: None,
        }),
        v4::Packet::PubAck(ack) => Packet::PubAck(v5::PubAck::new(ack.pkid, None)),
        v4::Packet::PubRec(rec) => Packet::PubRec(v5::PubRec::new(rec.pkid, None)),
        v4::Packet::PubComp(comp) => Packet::PubComp(v5::PubComp::new(comp.pkid, None)),
        v4::Packet::SubAck(ack) => Packet::SubAck(v5::SubAck {
            pkid: ack.pkid,
            return_codes: ack.return_codes.into_iter().map(up_subscribe_reason).collect(),
            properties: None,
        }),
        v4::Packet::UnsubAck(ack) => {
            Packet::UnsubAck(v5::UnsubAck { pkid: ack.pkid, reasons: Vec::new(), properties: None })
        }
        v4::Packet::ConnAck(ack) => Packet::ConnAck(v5::ConnAck {
            session_present: ack.session_present,
            code: up_connect_code(ack.code),
            properties: None,
        }),
        v4::Packet::PingResp => Packet::PingResp(v5::PingResp),
        // Nothing else is ever sent by a broker.
        _ => return Err(mqttbytes::Error::IncorrectPacketFormat),
    })
}

fn down_qos(qos: QoS) -> v4base::QoS {
    match qos {
        QoS::AtMostOnce => v4base::QoS::AtMostOnce,
        QoS::AtLeastOnce => v4base::QoS::AtLeastOnce,
        QoS::ExactlyOnce => v4base::QoS::ExactlyOnce,
    }
}

fn up_qos(qos: v4base::QoS) -> QoS {
    match qos {
        v4base::QoS::AtMostOnce => QoS::AtMostOnce,
        v4base::QoS::AtLeastOnce => QoS::AtLeastOnce,
        v4base::QoS::ExactlyOnce => QoS::ExactlyOnce,
    }
}

fn up_subscribe_reason(reason: v4::SubscribeReasonCode) -> v5::SubscribeReasonCode {
    match reason {
        v4::SubscribeReasonCode::Success(qos) => v5::SubscribeReasonCode::Success(up_qos(qos)),
        v4::SubscribeReasonCode::Failure => v5::SubscribeReasonCode::Failure,
    }
}

fn up_connect_code(code: v4::ConnectReturnCode) -> v5::ConnectReturnCode {
    match code {
        v4::ConnectReturnCode::Success => v5::ConnectReturnCode::Success,
        v4::ConnectReturnCode::RefusedProtocolVersion => v5::ConnectReturnCode::RefusedProtocolVersion,
        v4::ConnectReturnCode::BadClientId => v5::ConnectReturnCode::BadClientId,
        v4::ConnectReturnCode::ServiceUnavailable => v5::ConnectReturnCode::ServiceUnavailable,
        v4::ConnectReturnCode::BadUserNamePassword => v5::ConnectReturnCode::BadUserNamePassword,
        v4::ConnectReturnCode::NotAuthorized => v5::ConnectReturnCode::NotAuthorized,
    }
}

/// A socket, encrypted or not.
///
/// Mosquitto sends answers one by one and, as long as one of them is not acknowledged by TCP, holds the next one back
/// (Nagle's algorithm). What is written acknowledges what was read; who has nothing to write acknowledges after 40 ms or
/// more, and so long a batch would wait for its last answers. So flushing acknowledges what was read, where the system can
/// be told to.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: Stream,
    /// Something was read after the last write.
    owes: bool,
}

#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    #[cfg(feature = "tls")]
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl Socket {
    /// Connects to the broker of `config`; the caller bounds the time.
    pub(crate) async fn connect(config: &MqttConfig) -> Result<Self> {
        let endpoint = config.endpoint()?;
        let unreachable = |cause: io::Error| crate::error::unreachable(&endpoint, &cause).with_source(cause);
        let tcp = TcpStream::connect((endpoint.host(), endpoint.port())).await.map_err(unreachable)?;
        // Acknowledgements are small and answers are waited for; packets are written in batches anyway.
        tcp.set_nodelay(true).map_err(unreachable)?;
        if !endpoint.tls {
            return Ok(Self { stream: Stream::Plain(tcp), owes: false });
        }
        #[cfg(feature = "tls")]
        {
            use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};
            let name = ServerName::try_from(endpoint.host().to_owned())
                .map_err(|cause| crate::config::config("the host is no name for TLS").with_source(cause))?;
            let tls = TlsConnector::from(tls_config(config)?).connect(name, tcp).await.map_err(unreachable)?;
            Ok(Self { stream: Stream::Tls(Box::new(tls)), owes: false })
        }
        #[cfg(not(feature = "tls"))]
        Err(crate::error::error(polymq_core::ErrorKind::NotCompiledIn, "mqtts needs TLS, which is not compiled in"))
    }
}

/// Certificates and keys of `config` for rustls.
#[cfg(feature = "tls")]
pub(crate) fn tls_config(config: &MqttConfig) -> Result<std::sync::Arc<tokio_rustls::rustls::ClientConfig>> {
    use tokio_rustls::rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        version::{TLS12, TLS13},
    };

    use crate::config::TlsVersion;

    fn unusable(key: &str, cause: impl std::error::Error + Send + Sync + 'static) -> polymq_core::Error {
        crate::config::config(format!("setting {key:?} names a file that cannot be used: {cause}")).with_source(cause)
    }

    let mut roots = RootCertStore::empty();
    // Certificates of the system that rustls cannot read are no reason to refuse the others.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = &config.ca_file {
        for certificate in CertificateDer::pem_file_iter(path).map_err(|cause| unusable("ca_file", cause))? {
            let certificate = certificate.map_err(|cause| unusable("ca_file", cause))?;
            roots.add(certificate).map_err(|cause| unusable("ca_file", cause))?;
        }
    }
    let versions = match config.tls_min {
        TlsVersion::V12 => vec![&TLS12, &TLS13],
        TlsVersion::V13 => vec![&TLS13],
    };
    // Named here, because a program that links two providers has no default.
    let builder = ClientConfig::builder_with_provider(std::sync::Arc::new(ring::default_provider()))
        .with_protocol_versions(&versions)
        .map_err(|cause| unusable("ca_file", cause))?
        .with_root_certificates(roots);
    let tls = match (&config.cert_file, &config.key_file) {
        (Some(cert), Some(key)) => {
            let chain = CertificateDer::pem_file_iter(cert).map_err(|cause| unusable("cert_file", cause))?;
            let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|cause| unusable("cert_file", cause))?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|cause| unusable("key_file", cause))?;
            builder.with_client_auth_cert(chain, key).map_err(|cause| unusable("key_file", cause))?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(std::sync::Arc::new(tls))
}

impl Socket {
    /// Acknowledges at once what was read; without effect where the system has no such thing.
    fn acknowledge(&mut self) {
        self.owes = false;
        #[cfg(any(target_os = "linux", target_os = "android"))]
        {
            let tcp = match &self.stream {
                Stream::Plain(tcp) => tcp,
                #[cfg(feature = "tls")]
                Stream::Tls(tls) => tls.get_ref().0,
            };
            // A socket that refuses is as slow as it is, or gone, which reading tells.
            let _ = tcp.set_quickack(true);
        }
    }
}

macro_rules! delegate {
    ($stream:expr, $method:ident $(, $argument:expr)*) => {
        match &mut $stream {
            Stream::Plain(stream) => Pin::new(stream).$method($($argument),*),
            #[cfg(feature = "tls")]
            Stream::Tls(stream) => Pin::new(stream.as_mut()).$method($($argument),*),
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(delegate!(self.stream, poll_read, cx, into))?;
        self.owes = true;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(delegate!(self.stream, poll_write, cx, bytes))?;
        self.owes = false;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(delegate!(self.stream, poll_flush, cx))?;
        if self.owes {
            self.acknowledge();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self.stream, poll_shutdown, cx)
    }
}
