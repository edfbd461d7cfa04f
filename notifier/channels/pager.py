"""Pages of 160 characters over an e-mail-to-pager or e-mail-to-SMS gateway."""

from email.message import EmailMessage

from notifier.channels import Message
from notifier.channels.smtp import SmtpChannel
from notifier.message import short_text


class PagerChannel(SmtpChannel):
    """One pager's e-mail address, reached over the SMTP server of `[notifier]`."""

    def compose(self, message: Message) -> EmailMessage:
        """One part of plain ASCII, and no subject: gateways put it before the text and cut the text for it."""
        email = self.headers(message)
        email.set_content(short_text(message.short or message.subject), cte="7bit")
        return email
