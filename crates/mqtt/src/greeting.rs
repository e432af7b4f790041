//! Beginning and ending a connection politely.

use std::time::Duration;

use futures_util::{Sink, SinkExt, StreamExt};
use polymq_core::Result;
use rumqttc::v5::mqttbytes::{
    QoS,
    v5::{
        ConnAck, Connect, ConnectProperties, ConnectReturnCode, Disconnect, DisconnectProperties, DisconnectReasonCode,
        LastWill, Login,
    },
};
use tokio::{
    io::{ReadHalf, WriteHalf},
    time::timeout,
};
use tokio_util::codec::{FramedRead, FramedWrite};

use crate::{
    config::MqttConfig,
    error::{refused_connect, unreachable},
    limits,
    link::LinkOptions,
    wire::{Codec, Packet, Socket},
};

pub(crate) type Reader = FramedRead<ReadHalf<Socket>, Codec>;
pub(crate) type Writer = FramedWrite<WriteHalf<Socket>, Codec>;

/// Makes a connection and greets the broker; the caller bounds the time.
pub(crate) async fn establish(
    config: &MqttConfig,
    options: &LinkOptions,
    clean: bool,
) -> Result<(Reader, Writer, ConnAck)> {
    let endpoint = config.endpoint()?;
    let lost = |what: &str| unreachable(&endpoint, &format_args!("{what} before the broker answered CONNECT"));
    let (read, write) = tokio::io::split(Socket::connect(config).await?);
    let mut reader = FramedRead::new(read, Codec::new(config.protocol));
    let mut writer = FramedWrite::new(write, Codec::new(config.protocol));
    let mut properties = ConnectProperties::new();
    properties.session_expiry_interval = Some(seconds(options.session_expiry));
    properties.receive_maximum = Some(options.receive_maximum);
    let connect = Connect {
        keep_alive: u16::try_from(config.keep_alive.as_secs()).unwrap_or(u16::MAX),
        client_id: options.client_id.clone(),
        clean_start: clean || options.clean_start,
        properties: Some(properties),
    };
    let will = options.will.as_ref();
    let will = will.map(|(topic, payload)| LastWill::new(topic, payload.clone(), QoS::AtMostOnce, false, None));
    let login = endpoint.login().map(|(user, pass)| Login::new(user, pass));
    let written = writer.send(Packet::Connect(connect, will, login)).await;
    written.map_err(|cause| lost("the connection was lost").with_source(cause))?;
    match reader.next().await {
        Some(Ok(Packet::ConnAck(connack))) if connack.code == ConnectReturnCode::Success => {
            limits::check(config, &connack)?;
            Ok((reader, writer, connack))
        }
        Some(Ok(Packet::ConnAck(connack))) => {
            Err(refused_connect(connack.code, endpoint.login().map(|(user, _)| user)))
        }
        Some(Ok(_)) => Err(lost("another packet came")),
        Some(Err(cause)) => Err(lost("an unreadable packet came").with_source(cause)),
        None => Err(lost("the connection was closed")),
    }
}

/// Ends a connection after everything that was written is read; with `end_session`, the session too.
pub(crate) async fn leave(
    config: &MqttConfig,
    options: &LinkOptions,
    mut reader: Reader,
    mut writer: Writer,
    end_session: bool,
) {
    let mut packet = Disconnect::new(DisconnectReasonCode::NormalDisconnection);
    // An interval that was zero at CONNECT must stay zero (3.14.2.2.2): then it needs no ending either.
    if end_session && !options.session_expiry.is_zero() {
        packet.properties = Some(DisconnectProperties {
            session_expiry_interval: Some(0),
            reason_string: None,
            user_properties: Vec::new(),
            server_reference: None,
        });
    }
    let farewell = async {
        let _ = writer.send(Packet::Disconnect(packet)).await;
        let _ = SinkExt::<Packet>::close(&mut writer).await;
        // Closing a socket that holds unread packets resets the connection, and mosquitto then forgets to read
        // the acknowledgements before the reset.
        while let Some(Ok(_)) = reader.next().await {}
    };
    // A broker that does not read must not keep us from going; what it has not read yet, it delivers again.
    let _ = timeout(config.operation_timeout, farewell).await;
}

/// Encodes into memory; what cannot be encoded was checked before. Whether it was encoded.
pub(crate) fn write(writer: &mut Writer, packet: Packet) -> bool {
    let written = std::pin::Pin::new(writer).start_send(packet);
    if let Err(cause) = &written {
        tracing::error!(%cause, "a packet could not be encoded");
    }
    written.is_ok()
}

/// A session expiry on the wire; the largest number means "never".
fn seconds(expiry: Duration) -> u32 {
    u32::try_from(expiry.as_secs()).unwrap_or(u32::MAX)
}
