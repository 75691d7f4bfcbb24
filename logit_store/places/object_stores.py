"""Opening S3, GCS and Azure by address: which bucket, by which credentials, at which endpoint.

obstore takes credentials and endpoint from the environment, as each service's own tools have it. What is done
here beside that: addresses, and S3's files of profiles, which obstore does not read.
"""

import configparser
import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow.fs import resolve_s3_region

from sparsekd.logit_store.errors import StoreError
from sparsekd.logit_store.places.object_files import ObjectFiles
from sparsekd.logit_store.places.paths import RemotePath

SCHEMES = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}

_OPTIONS = ("endpoint_override", "region", "scheme")
"""What may follow a question mark, of S3 and GCS; the names are pyarrow's."""

_TIMES = ({"timeout": "3600s", "read_timeout": "60s"}, {"timeout": "3600s"})
"""Of requests that read, and of uploads, during which nothing is read: in all, and without a byte."""

_S3_SOURCES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Variables that come before profiles."""


def open_object_store(scheme: str, text: str, shown: str) -> RemotePath:
    """Returns the place that an address names; nothing is asked of the service but S3 for the region.

    Args:
        scheme: one of `SCHEMES`.
        text: the address: `s3://bucket/folder`, `gs://bucket/folder`, `az://container/folder` or
            `abfs://container@account.dfs.core.windows.net/folder`; with `KEY:SECRET@` before an S3 bucket,
            `anonymous@` before one on GCS, and `_OPTIONS` behind a question mark.
        shown: the address without credentials and options, for messages.

    Raises:
        StoreError: it cannot be used so.
    """
    kind = SCHEMES[scheme]
    parts = urlsplit(text)
    before, _, host = parts.netloc.rpartition("@")
    account = ""
    if kind == "azure" and before:
        before, host, account = "", before, host.partition(".")[0]
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    # Nothing that follows the question mark or precedes the bucket goes into a message: it may be a secret.
    if not options.keys() <= set(_OPTIONS) or (options and kind == "azure"):
        raise StoreError(
            f"{shown} cannot be opened: an option behind its question mark is none of "
            f"{', '.join(_OPTIONS)} (of S3 and GCS)."
        )
    if not re.fullmatch(r"[A-Za-z0-9._-]+", host) or not re.fullmatch(r"[^\s/]*", before):
        raise StoreError(
            f"{shown} cannot be opened: there is no bucket's name where one belongs; a slash in a secret is "
            "written %2F."
        )
    config: dict[str, Any] = {}
    if endpoint := options.get("endpoint_override"):
        config["endpoint"] = f"{options.get('scheme', 'https')}://{endpoint}"
    provider = None
    if kind == "s3":
        provider = _fill_s3(config, host, before, options.get("region"), shown, os.environ)
    elif kind == "gcs":
        if endpoint:
            config["base_url"] = config.pop("endpoint")
        if before == "anonymous":
            config["skip_signature"] = True
    elif account:
        config["account_name"] = account
    files = _open(kind, host, config, provider, shown)
    root = f"{scheme}://{parts.netloc if account else host}/"
    return RemotePath(files, root, unquote(parts.path).strip("/"))


def _open(kind: str, bucket: str, config: dict[str, Any], provider: Any, shown: str) -> ObjectFiles:
    try:
        from obstore import exceptions, store
    except ImportError:
        raise StoreError(
            f"{shown} needs the package obstore, which is not installed: pip install obstore."
        ) from None
    open_bucket = {"s3": store.S3Store, "gcs": store.GCSStore, "azure": store.AzureStore}[kind]
    given = {"credential_provider": provider} if provider is not None else {}
    try:
        stores = [
            # An endpoint is what somebody has written down, so `http://` is meant where it stands there.
            open_bucket(bucket, config=config, client_options={"allow_http": True, **times}, **given)
            for times in _TIMES
        ]
    except (exceptions.BaseError, ValueError) as error:
        raise StoreError(
            f"{shown} cannot be opened: its settings are not complete or contradict one another "
            f"({type(error).__name__} of obstore)."
        ) from None
    return ObjectFiles(*stores)


def _fill_s3(
    config: dict[str, Any],
    bucket: str,
    before: str,
    region: str | None,
    shown: str,
    environment: Mapping[str, str],
) -> Any:
    """Adds credentials and region to a bucket's settings; returns a provider of credentials, or None."""
    config["disable_bulk_delete"] = True  # some services lack that request, and we delete one at a time
    provider = None
    profile = _s3_profile(environment, shown)
    if before:
        key, _, secret = before.partition(":")
        config |= {"access_key_id": unquote(key), "secret_access_key": unquote(secret)}
    elif profile and not any(name in environment for name in _S3_SOURCES):
        if {"aws_access_key_id", "aws_secret_access_key"} <= profile.keys():
            names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
            config |= {name: profile[name] for name in names if name in profile}
        elif {"sso_session", "sso_start_url", "role_arn", "credential_process"} & profile.keys():
            provider = _boto3_provider(shown)
    has_endpoint = "endpoint" in config or any(name.startswith("AWS_ENDPOINT") for name in environment)
    if region is None and not {"AWS_REGION", "AWS_DEFAULT_REGION"} & environment.keys():
        region = profile.get("region")
        if region is None and not has_endpoint:
            try:
                region = resolve_s3_region(bucket)
            except OSError as error:
                raise StoreError(
                    f"{shown} cannot be opened: the region of the bucket could not be found out "
                    f"({str(error).partition(chr(10))[0].rstrip('.')}); set AWS_REGION."
                ) from None
    if region is not None:
        config["region"] = region
    return provider


def _s3_profile(environment: Mapping[str, str], shown: str) -> dict[str, str]:
    """Returns what Amazon's files say of the profile in use; empty where there are none."""
    home = Path(environment.get("HOME", "~")).expanduser() / ".aws"
    name = environment.get("AWS_PROFILE", "default")
    found: dict[str, str] = {}
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        place = Path(environment.get(variable) or home / usual)
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read(place, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError):
            # Not the error, which quotes the file.
            raise StoreError(f"{shown} cannot be opened: {place} cannot be read.") from None
        if parser.has_section(section):
            found |= dict(parser.items(section))
    return found


def _boto3_provider(shown: str) -> Any:
    try:
        # Not installed with this package, so not imported at the top of a module.
        return importlib.import_module("obstore.auth.boto3").Boto3CredentialProvider()
    except ImportError:
        raise StoreError(
            f"{shown} cannot be opened: the AWS profile signs on by SSO, a role or a process, for which the "
            "package boto3 is needed: pip install boto3, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from None
