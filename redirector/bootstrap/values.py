"""What the parts of a bootstrap are made of."""

#: A JSON value as `json.dumps` takes it.
Json = str | int | bool | list["Json"] | dict[str, "Json"]


def socket_address(host: str, port: int) -> dict[str, Json]:
    """envoy.config.core.v3.Address."""
    return {"socket_address": {"address": host, "port_value": port}}
